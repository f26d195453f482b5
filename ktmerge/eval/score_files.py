"""Score files: from the JSON that results are written as back to what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError
from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore

if TYPE_CHECKING:
    from ktmerge.eval.results import Results

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
        "tasks": [TaskInfo(**task) for task in document["suite"]["tasks"]],
        "models": {name: ModelInfo(**{key: one[key] for key in _keys(ModelInfo)}) for name, one in models.items()},
        "scores": {name: _scores(one["tasks"]) for name, one in models.items()},
        "created": str(document["created"]),
        "versions": dict(document["versions"]),
        "warnings": list(document["warnings"]),
        **{key: document["settings"][key] for key in ("base", "reference", "bootstrap", "seed")},
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
    for task in results.tasks:
        if any(len(column) not in (0, len(task.rows)) for column in (task.prompts, task.references, task.choices)):
            raise UsageError(f"{where}: a damaged score file: the items of '{task.name}'.")
    for model, tasks in results.scores.items():
        if list(tasks) != names:
            raise UsageError(f"{where}: a damaged score file: the tasks of '{model}' are not the suite's.")
        for task in results.tasks:
            scores = tasks[task.name].scores
            within = bool(((scores >= 0) & (scores <= LARGEST.get(task.metric, 1.0))).all())
            whole = tasks[task.name].total is not None
            good = scores.shape == (len(task.rows),) and within and whole != bool(len(scores))
            if not good:
                raise UsageError(f"{where}: a damaged score file: scores of '{model}' on '{task.name}'.")


def _scores(tasks: dict[str, Any]) -> dict[str, TaskScore]:
    return {name: TaskScore.from_json(one) for name, one in tasks.items()}


def _keys(model: type[ModelInfo]) -> Sequence[str]:
    return [one.name for one in fields(model)]
