"""Several suites scored as one: upstream sets of one, downstream sets of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ktmerge.errors import UsageError
from ktmerge.recipes.load import load_suite
from ktmerge.recipes.suites import Suite

_PLACES = ("data", "images", "shots_from", "include_path")


def load_suites(references: Sequence[str | Path]) -> Suite:
    """One suite of the sets of all, in order.

    Raises:
        UsageError: one cannot be loaded, two have a set of the same name, or keep other shares of rows for selection.
    """
    suites = [load_suite(reference) for reference in references]
    if len(suites) == 1:
        return suites[0]
    name = "+".join(suite.name for suite in suites)
    if len({suite.selection for suite in suites}) > 1:
        raise UsageError(f"the suites {name} keep different shares of rows for selection; write one suite of them.")
    names = [task.name for suite in suites for task in suite.tasks()]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise UsageError(f"two of the suites {name} have a set called '{twice[0]}'.")
    return Suite(
        ktmerge_suite=suites[0].ktmerge_suite,
        name=name,
        upstream=[_placed(task, suite.folder) for suite in suites for task in suite.upstream],
        downstream=[_placed(task, suite.folder) for suite in suites for task in suite.downstream],
        selection=suites[0].selection,
        folder=suites[0].folder,
        places={name: place for suite in suites for name, place in suite.places.items()},
    )


def _placed(task: Any, folder: Path) -> Any:
    """The task with its relative paths made absolute."""
    given = {key: getattr(task, key, None) for key in _PLACES}
    found: dict[str, Any] = {key: _absolute(path, folder) for key, path in given.items() if path is not None}
    join = getattr(task, "join", None)
    if isinstance(join, BaseModel):
        found["join"] = _placed(join, folder)
    return task.model_copy(update={key: value for key, value in found.items() if value != given.get(key)})


def _absolute(path: str, folder: Path) -> str:
    return path if path.startswith("hf:") else str(folder / path)
