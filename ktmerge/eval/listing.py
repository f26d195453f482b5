"""Results as files for other tools: a table for a model card in Markdown, every score in CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from ktmerge.eval.summary import FORMULAS, Estimate
from ktmerge.markdown import line, table

if TYPE_CHECKING:
    from ktmerge.eval.results import Results
    from ktmerge.eval.scores import TaskInfo

_HEADINGS = {"E": "E gain", "F": "F upstream", "O": "O overall", "avg": "Avg", "H": "H", "retention": "kept %"}


def markdown(results: Results) -> str:
    """Leaderboard, raw scores and formulas, as a model card has them."""
    keys = [key for key in _HEADINGS if any(getattr(one, key) is not None for one in results.summary.models.values())]
    order = [results.base, *results.summary.ranked(name for name in results.models if name != results.base)]
    board = [["model", *(_HEADINGS[key] for key in keys)]]
    for name in order:
        summary = results.summary.models[name]
        board.append([name, *(_told(getattr(summary, key), signed=key in ("E", "F", "O")) for key in keys)])
    raw = [["model", *(f"{task.name} ({task.side})" for task in results.tasks)]]
    for name in order:
        raw.append([name, *(_score(results, name, task) for task in results.tasks)])
    used = [f"* {FORMULAS[key]}" for key in (*keys, "means") if key != "means" or "H" in keys]
    items = sum(len(task.rows) for task in results.tasks)
    measured = (
        f"Suite {line(results.suite)}, sha256 `{results.suite_digest[:16]}`, {items} items; brackets are 95 % "
        f"intervals of a paired bootstrap over {results.drawn}, {results.bootstrap} resamples, seed {results.seed}."
    )
    cautions = "\n".join(f"* {line(caution)}" for caution in results.cautions)
    parts = [
        "## What was learned, what was kept",
        table(board[0], board[1:]),
        "\n".join(used),
        "### Raw scores",
        table(raw[0], raw[1:]),
    ]
    return "\n\n".join([*parts, measured, *([cautions] if cautions else [])]) + "\n"


def comma_separated(results: Results) -> str:
    """One row for each model and set, and one for each model and summary number."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["model", "quantity", "side", "metric", "items", "value", "low", "high", "stderr"])
    for name in results.models:
        summary = results.summary.models[name]
        for key in ("E", "F", "O", "avg", "H", "retention", "gain_share"):
            estimate: Estimate | None = getattr(summary, key)
            if estimate is not None:
                writer.writerow([name, key, "", "", "", *_numbers(estimate), ""])
        for task in results.tasks:
            mean, stderr = results.scores[name][task.name].mean, results.stderr(name, task)
            told = "" if stderr is None else f"{stderr:.6g}"
            writer.writerow([name, task.name, task.side, task.metric, len(task.rows), f"{mean:.6g}", "", "", told])
    return stream.getvalue()


def _score(results: Results, model: str, task: TaskInfo) -> str:
    mean, stderr = results.scores[model][task.name].mean, results.stderr(model, task)
    return f"{mean:.1f}" + ("" if stderr is None else f" ± {stderr:.1f}")


def _told(estimate: Estimate | None, *, signed: bool) -> str:
    if estimate is None:
        return "–"
    form = "+.1f" if signed else ".1f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _numbers(estimate: Estimate) -> list[str]:
    return [f"{number:.6g}" for number in (estimate.value, estimate.low, estimate.high)]
