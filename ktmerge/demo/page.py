"""The demo's report: what it shows beside the scores, and what it says of how they came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.checkpoints.files import write_whole
from ktmerge.demo.data import SETS
from ktmerge.demo.model import NAME
from ktmerge.demo.selection import Selection
from ktmerge.progress import Progress

if TYPE_CHECKING:
    from ktmerge.eval import Generation, Results

PROMPTS = (
    ("The capital of Japan is", "knowledge"),
    ("In the beginning God created", "prose"),
    ("def add(a, b):\n    return", "code"),
    ("Question: What do bees make?\nAnswer:", "a question"),
)
"""What every model is asked to continue, for the reader to compare; nothing here is scored."""


def showcase(blends: Mapping[str, Path], chosen: Mapping[str, Selection]) -> dict[str, Path]:
    """The blends whose answers stand beside the experts': each expert's own, and the best on the selection split."""
    best = max(blends, key=lambda name: max(point.E + point.F for point in chosen[name].points))
    return {name: path for name, path in blends.items() if name.endswith("-back") or name == best}


def answers(out: Path, results: Results, models: Mapping[str, Path], progress: Progress) -> list[Generation]:
    """What the models make of the prompts; kept in ``answers.json`` with the digests of the models."""
    from ktmerge.eval import Generation, generations

    path = out / "answers.json"
    inputs = {"models": {name: results.models[name].digest for name in models}, "prompts": [list(p) for p in PROMPTS]}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["inputs"] == inputs:
            return [Generation(**one) for one in document["answers"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    prompts, notes = zip(*PROMPTS, strict=True)
    found = generations(models, prompts, max_new_tokens=24, notes=notes, progress=progress)
    document = {"inputs": inputs, "answers": [asdict(answer) for answer in found]}
    write_whole(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return found


def report(
    out: Path,
    results: Results,
    experts: Mapping[str, Path],
    texts: Mapping[str, str],
    chosen: Mapping[str, Selection],
    answers: Sequence[Generation],
) -> Path:
    """Write the report; return its path."""
    from ktmerge import eval as evaluation
    from ktmerge.pipeline import training_log

    text = evaluation.render(
        results,
        title="ktmerge demo: two tasks learned, the rest kept",
        recipes=texts,
        generations=answers,
        paths={name: results.path(_way(name, selection, experts)) for name, selection in chosen.items()},
        training={name: training_log(path) for name, path in experts.items()},
        tuned=list(experts),
        notes=_notes(chosen),
    )
    write_whole(out / "report.html", text)
    return out / "report.html"


def _way(name: str, selection: Selection, experts: Mapping[str, Path]) -> dict[float, str]:
    """The scored models that lie on one recipe's way: base, blend, and for a single expert the expert itself."""
    way = {0.0: "base", selection.shown: name}
    for expert in experts:
        if name == f"{expert}-back":
            way[1.0] = expert
    return way


def _notes(chosen: Mapping[str, Selection]) -> list[str]:
    tried = "; ".join(
        f"{name}: " + ", ".join(f"{p.coefficient:g} gave {p.E + p.F:+.1f}" for p in one.points if p.coefficient)
        for name, one in chosen.items()
    )
    sets = [
        f"{one.name} ({one.side}): {one.asks}; {one.package.name} {one.package.version}, {one.package.licence}."
        for one in SETS
    ]
    return [
        f"The base is {NAME}, so it is not bit-equal to the published weights.",
        "Every blend coefficient was chosen by O = E + F on a selection split; all that is shown above was measured on "
        f"other items. O on the selection split: {tried}.",
        *sets,
    ]
