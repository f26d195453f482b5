"""The report: one HTML page with everything in it, readable offline, on paper, on a telephone, by day and by night."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ktmerge.drawing import styles
from ktmerge.eval.partition import FORMULAS as PARTITION_FORMULAS
from ktmerge.eval.picture import loss_picture, score_pictures, tradeoff
from ktmerge.eval.provenance import provenance
from ktmerge.eval.results import Generation, PathPoint
from ktmerge.eval.scores import TaskInfo
from ktmerge.eval.summary import FORMULAS
from ktmerge.eval.table import of_total, plain, with_interval, worst
from ktmerge.eval.telling import telling
from ktmerge.eval.verdict import verdict

if TYPE_CHECKING:
    from ktmerge.eval.results import Results


def render(
    results: Results,
    *,
    title: str | None = None,
    recipes: Mapping[str, str] | None = None,
    generations: Sequence[Generation] = (),
    paths: Mapping[str, Sequence[PathPoint]] | None = None,
    training: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    tuned: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    layers: Mapping[str, str] | None = None,
    commands: Sequence[str] = (),
) -> str:
    """The report as the text of one self-contained HTML file.

    Args:
        results: the scores.
        title: headline.
        recipes: name and YAML text of each recipe to print.
        generations: side-by-side answers; answers of generate tasks are added by themselves where models differ.
        paths: ways of blend coefficients for the picture, see :meth:`Results.path`.
        training: per fine-tune its log, records with ``step`` and any of ``loss``, ``eval_..._loss``.
        tuned: names of the fine-tunes, whatever was trained; default: the models that ``training`` has logs of.
        notes: further sentences on how it was measured, such as which split chose the coefficient.
        layers: drawings (SVG) of how far each layer moved, by what they show.
        commands: that make all of it again, in order.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["intervals"] = _intervals
    template = environment.from_string((files("ktmerge.eval") / "page.html.j2").read_text(encoding="utf-8"))
    full = [name for name in (tuned if tuned is not None else training or ()) if name in results.models]
    looks = styles(results.models, results.base)
    origins = provenance(results)
    anchors = {name: f"model-{number}" for number, name in enumerate(results.models)}
    links = {name: anchors[name] for name in origins}
    columns = _number_columns(results)
    return template.render(
        title=title or f"{results.suite}: what was learned, what was kept",
        results=results,
        upstream=results.sides("upstream"),
        downstream=results.sides("downstream"),
        firsts=[side[0].name for side in (results.sides("upstream"), results.sides("downstream")) if side],
        verdict=verdict(results, full),
        picture=_inline(tradeoff(results, paths, {name: one.summary for name, one in origins.items()}, links)),
        origins=origins,
        anchors=anchors,
        layers={name: _drawing(svg, f"layers-{i}-") for i, (name, svg) in enumerate((layers or {}).items())},
        commands=commands,
        scores=[_inline(one) for one in score_pictures(results)],
        losses=_inline(loss_picture(training or {})),
        rows=[_row(results, name, looks[name].colour, name in full) for name in results.models],
        columns=columns,
        comparisons=[(a, b, results.difference(a, b).numbers) for a, b in results.pairs()],
        with_interval=with_interval,
        colours={name: look.colour for name, look in looks.items()},
        recipes=recipes or {},
        generations=generations,
        answers=[(task, shown) for task in results.tasks if (shown := telling(results, task))],
        formulas=[FORMULAS[key] for key in (*columns, "means") if key != "means" or "H" in columns],
        shares=_shares(results),
        share_formulas=PARTITION_FORMULAS,
        notes=[*notes, *results.cautions],
        has_paths=any((paths or {}).values()),
    )


@dataclass(frozen=True)
class _Row:
    """One model in the tables."""

    name: str
    colour: str
    kind: str
    numbers: dict[str, str]
    scores: dict[str, tuple[str, list[str]]]
    best: bool


def _row(results: Results, name: str, colour: str, is_tuned: bool) -> _Row:
    summary = results.summary.models[name]
    is_base = name == results.base
    overall = {other: one.O.value for other, one in results.summary.models.items() if one.O is not None}
    estimates = {"E": summary.E, "F": summary.F, "O": summary.O}
    numbers = {key: "0" if is_base else with_interval(one) for key, one in estimates.items()}
    numbers |= {
        "avg": plain(summary.avg),
        "H": with_interval(summary.H, signed=False),
        "retention": plain(summary.retention),
        "gain_share": "–" if is_base else plain(summary.gain_share),
        "worst": "–" if is_base else worst(summary),
    }
    return _Row(
        name=name,
        colour=colour,
        kind="untuned" if is_base else "fine-tune" if is_tuned else "",
        numbers=numbers,
        scores={task.name: _score(results, name, task) for task in results.tasks},
        best=bool(overall) and not is_base and name == max(overall, key=lambda other: overall[other]),
    )


def _score(results: Results, model: str, task: TaskInfo) -> tuple[str, list[str]]:
    """A score, and in small print its standard error and perplexity per byte."""
    score = results.scores[model][task.name]
    stderr = results.stderr(model, task)
    small = [] if stderr is None else [f"± {stderr:.1f}"]
    perplexity = score.extras().get("perplexity_per_byte")
    small += [] if perplexity is None else [f"{perplexity:.3f} ppl/B"]
    return f"{score.mean:.1f}", small


def _number_columns(results: Results) -> dict[str, str]:
    """Keys and headings of the numbers that at least one model has."""
    headings = {"E": "E gain", "F": "F upstream", "O": "O overall", "avg": "Avg", "H": "H"}
    headings |= {"retention": "kept %", "gain_share": "gain share %", "worst": "worst upstream set"}
    summaries = results.summary.models.values()
    return {key: text for key, text in headings.items() if any(getattr(one, key) is not None for one in summaries)}


def _shares(results: Results) -> dict[str, list[str]]:
    """What became of the items that the reference changed, per model; empty without a reference."""
    found = {name: results.partition(name) for name in results.models}
    return {
        name: [of_total(getattr(one, key)) for key in PARTITION_FORMULAS]
        for name, one in found.items()
        if one is not None
    }


def _intervals(sentence: str) -> Markup:
    """A sentence with its [intervals] set apart and never broken over lines."""
    return Markup(re.sub(r"\[[^\]]*\]", r'<span class="interval">\g<0></span>', str(escape(sentence))))


def _inline(svg: str | None) -> Markup | None:
    """An SVG for use inside HTML, which needs no namespaces."""
    if svg is None:
        return None
    return Markup(re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href"))


def _drawing(svg: str, prefix: str) -> Markup | None:
    """A whole SVG file for use inside HTML, its ids set apart from those of other drawings."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', lambda found: found[1] + prefix, svg)
    return _inline(svg.replace("<svg", '<svg role="img" aria-label="Change by layer and kind of tensor"', 1))
