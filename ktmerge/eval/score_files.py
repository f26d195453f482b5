"""Score files: from the JSON that results are written as back to what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore

_SETTINGS: dict[str, Any] = {
    "base": str, "reference": str | None, "bootstrap": Annotated[int, Field(ge=1, le=1_000_000, strict=True)],
    "seed": Annotated[int, Field(ge=0, strict=True)],
}  # fmt: skip


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
