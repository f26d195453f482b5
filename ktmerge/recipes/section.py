"""What the sections of a recipe have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Nothing unknown is let through, nothing changes; checks are built when the first recipe is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, defer_build=True)


def as_list(value: Any) -> Any:
    """One text stands for a list of one."""
    return [value] if isinstance(value, str) else value


def as_sum(value: Any) -> Any:
    """A list of parts stands for their sum."""
    return "+".join(map(str, value)) if isinstance(value, list) else value
