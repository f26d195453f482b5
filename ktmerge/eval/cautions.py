"""What a reader of scores should keep in mind: how small a difference the items can show, and how many were tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ktmerge.eval.significance import detectable, luck
from ktmerge.eval.statistics import standard_error

if TYPE_CHECKING:
    from ktmerge.eval.results import Results
    from ktmerge.eval.summary import Estimate

MANY = 4  # candidates from which on the luck of the best is spoken of
FEWEST = 10  # items of a set, or texts that were cut into items, from which on a bootstrap says something
_WIDTH = 2 * 1.959964  # standard errors inside a 95 % interval


def cautions(results: Results) -> list[str]:
    """Sentences on power, many candidates, selection and scales that do not mix; none if only the base is there."""
    others = [name for name in results.models if name != results.base]
    said = [*_power(results, others), *_many(results, others)]
    if results.part == "selection":
        said.append("These rows are kept for choosing; report the chosen model on the other part (--part report).")
    if others:
        said += few({task.name: task.groups for task in results.paired()})
    single = [task.name for task in results.paired() if len(set(task.clusters or task.rows)) == 1 < len(task.rows)]
    if others and single:
        said.append(f"One text or image alone ({', '.join(single)}): intervals are over its items, and of it only.")
    wide = [task.name for task in results.tasks if task.metric == "cider"]
    if wide and len(results.tasks) > len(wide):
        said.append(
            f"CIDEr ({', '.join(wide)}) is printed times 100 and may exceed 100; beside accuracies it weighs more in "
            "E, F, O, Avg and H than they do."
        )
    return said


def few(groups: Mapping[str, Sequence[int]]) -> list[str]:
    """A sentence on sets of too few items or texts; of each item, by set, what it is drawn with."""
    names = [name for name, own in groups.items() if len(set(own)) < FEWEST]
    if not names:
        return []
    return [
        f"Fewer than {FEWEST} items, texts or images ({', '.join(names)}): a bootstrap of so few gives intervals that "
        "are too narrow."
    ]


def _power(results: Results, others: list[str]) -> list[str]:
    parts = []
    for task in results.paired():
        base = results.scores[results.base][task.name].scores
        errors = [standard_error(results.scores[name][task.name].scores - base, task.groups) for name in others]
        largest = max((error for error in errors if error), default=None)
        if largest is not None:
            parts.append(f"{task.name}: with {len(base)} items above {detectable(largest):.1f} points")
    if not parts:
        return []
    for key in ("E", "F", "O"):
        errors = [_error(getattr(results.summary.models[name], key)) for name in others]
        largest = max((error for error in errors if error), default=None)
        if largest is not None:
            parts.append(f"{key}: above {detectable(largest):.1f} points")
    return [f"Differences from the base that would be seen 4 times in 5: {'; '.join(parts)}."]


def _many(results: Results, others: list[str]) -> list[str]:
    candidates = [name for name in others if name != results.reference]
    if len(candidates) < MANY:
        return []
    errors = [error for name in candidates if (error := _error(results.summary.models[name].O)) is not None]
    by = f" by about {luck(len(candidates), sum(errors) / len(errors)):.1f} points of O" if errors else ""
    return [
        f"{len(candidates)} candidates were scored: the best of that many equal ones looks better than it is{by}. "
        "Choose on one part of the rows and report on another ('selection' in the suite, --part)."
    ]


def _error(estimate: Estimate | None) -> float | None:
    return None if estimate is None else (estimate.high - estimate.low) / _WIDTH
