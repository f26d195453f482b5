"""What the sections of recipes and suites have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """Nothing unknown is let through, nothing changes, and nothing is taken for what it is not: no true for 1, no text
    for a number, no infinity. Checks are built when the first recipe is read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, document: Any) -> Any:
        """A whole number may be written as 4.0 or 1e3, as JSON Schema has it."""
        if not isinstance(document, dict):
            return document
        fields = cls.model_fields
        return {key: int(one) if key in fields and _is_whole(one) else one for key, one in document.items()}


class Section(Strict):
    """A part of a recipe."""

    model_config = ConfigDict(populate_by_name=True)


def as_list(value: Any) -> Any:
    """One text stands for a list of one."""
    return [value] if isinstance(value, str) else value


def as_sum(value: Any) -> Any:
    """A list of parts stands for their sum."""
    return "+".join(map(str, value)) if isinstance(value, list) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()
