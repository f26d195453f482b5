"""The two halves of a sweep's items: those that choose a recipe, and those that report on the chosen one."""

from __future__ import annotations

from collections.abc import Hashable

from ktmerge.errors import UsageError
from ktmerge.eval.sets import TaskSet, read_sets
from ktmerge.recipes.harness import HarnessTask
from ktmerge.sweep.settings import SweepSettings


def read_halves(settings: SweepSettings) -> tuple[list[TaskSet], list[TaskSet]]:
    """Read the sets to choose on, and those to report on.

    Raises:
        UsageError: something is wrong with data or templates, or a row is in both halves.
    """
    suites = zip((settings.suite, settings.held_out), settings.parts, strict=True)
    chosen, reported = (read_sets(suite, part) for suite, part in suites)
    there = {row for one in chosen for row in _rows(one)}
    for one in reported:
        own = _rows(one)
        if shared := len(own & there):
            raise UsageError(
                f"task '{one.task.name}': {shared} of its {len(own)} rows to report on are among those that choose the "
                "recipe. What chose it says nothing of how good it is: name other data by --held-out, or give the "
                "suite 'selection: 0.3' and leave --held-out out."
            )
    return chosen, reported


def _rows(one: TaskSet) -> set[Hashable]:
    """The rows of a set, the same whatever is asked about them."""
    if isinstance(one.task, HarnessTask):
        parts = one.harness.rows if one.harness is not None else {}
        own = one.task.include_path and one.data_digest  # task files of two folders may have one name
        return {(own, name, row) for name, rows in parts.items() for row in rows}
    each = tuple(sorted(one.task.each.items()))
    return {(one.data_digest, each, item.row) for item in one.items}
