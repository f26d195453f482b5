"""Score files: from the JSON that results are written as back to what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ktmerge.errors import UsageError
from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore

if TYPE_CHECKING:
    from ktmerge.eval.results import Results

_SETTINGS: dict[str, Any] = {
    "base": str, "reference": str | None, "bootstrap": Annotated[int, Field(ge=1, strict=True)],
    "seed": Annotated[int, Field(ge=0, strict=True)],
}  # fmt: skip
LARGEST = {"cider": 10.0}  # item score of metrics that go beyond 1


def parse(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of results that a file's document holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is damaged.
    """
    models = document["models"]
    return {
        "suite": str(document["suite"]["name"]),
        "suite_digest": str(document["suite"]["digest"]),
        "tasks": _checked(list[TaskInfo], document["suite"]["tasks"]),
        "models": {
            name: _checked(ModelInfo, {key: one[key] for key in _keys(ModelInfo)}) for name, one in models.items()
        },
        "scores": {name: _scores(one["tasks"]) for name, one in models.items()},
        "created": str(document["created"]),
        "versions": _checked(dict[str, str], document["versions"]),
        "warnings": _checked(list[str], document["warnings"]),
        **{key: _checked(kind, document["settings"][key]) for key, kind in _SETTINGS.items()},
        "part": str(document["settings"].get("part", "all")),
    }


def check(results: Results, where: str) -> None:
    """Refuse results whose parts do not fit together.

    Raises:
        UsageError: it names the file.
    """
    names = [task.name for task in results.tasks]
    if results.base not in results.models or not names:
        raise UsageError(f"{where}: a damaged score file: no base, or no tasks.")
    if results.reference is not None and results.reference not in results.models:
        raise UsageError(f"{where}: a damaged score file: the reference '{results.reference}' is no model of it.")
    for task in results.tasks:
        if any(len(column) not in (0, len(task.rows)) for column in (task.prompts, task.references, task.choices)):
            raise UsageError(f"{where}: a damaged score file: the items of '{task.name}'.")
    for model, tasks in results.scores.items():
        if list(tasks) != names:
            raise UsageError(f"{where}: a damaged score file: the tasks of '{model}' are not the suite's.")
        for task in results.tasks:
            scores = tasks[task.name].scores
            within = bool(((scores >= 0) & (scores <= LARGEST.get(task.metric, 1.0))).all())
            total, details = tasks[task.name].total, tasks[task.name].details.values()
            good = scores.shape == (len(task.rows),) and within and (total is None) == bool(len(scores))
            good = good and all(isinstance(column, list) and len(column) == len(scores) for column in details)
            if not good or not all(map(isfinite, total or ())):
                raise UsageError(f"{where}: a damaged score file: scores of '{model}' on '{task.name}'.")


def _scores(tasks: dict[str, Any]) -> dict[str, TaskScore]:
    return {name: TaskScore.from_json(one) for name, one in tasks.items()}


def _checked(kind: Any, value: Any) -> Any:
    """``value`` as one of that kind, if all in it is of the right type."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _keys(model: type[ModelInfo]) -> Sequence[str]:
    return [one.name for one in fields(model)]
