"""``--set blend.lambda=0.8``: change any key of a recipe from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.recipes.document import parse_yaml

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply ``key.path[0]=value`` strings in order; values are YAML. Missing mappings on the way are made.

    Raises:
        UsageError: no ``=``, a malformed path, a list index past the end, or a step into something that is no mapping.
    """
    for override in overrides:
        path, equals, value = override.partition("=")
        steps = steps_of(path)
        if not equals or not steps:
            raise UsageError(f"--set {override}: write key=value, e.g. --set blend.lambda=0.8.")
        _assign(document, steps, parse_yaml(value, f"--set {override}") if value.strip() else None, f"--set {override}")
    return document


def set_key(document: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set ``key.path[0]`` to a value; ``where`` names it in messages.

    Raises:
        UsageError: as for `apply_overrides`.
    """
    _assign(document, steps_of(key), value, where)


def steps_of(path: str) -> list[str | int]:
    """``blend.where[0].lambda`` as its steps; empty if it is not written so."""
    steps: list[str | int] = []
    position = 0
    for match in _STEP.finditer(path):
        if path[position : match.start()] not in ("", "."):
            return []
        steps.append(match[1] if match[1] is not None else int(match[2]))
        position = match.end()
    return steps if position == len(path) and steps and isinstance(steps[0], str) else []


def _assign(target: Any, steps: list[str | int], value: Any, where: str) -> None:
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(step, int):
            if not isinstance(target, list) or step >= len(target):
                raise UsageError(f"{where}: there is no item [{step}] in {_spell(steps[:i])}.")
        elif not isinstance(target, dict):
            raise UsageError(f"{where}: {_spell(steps[:i])} has no keys inside.")
        elif not last and target.get(step) is None:
            target[step] = {}
        if last:
            target[step] = value
        else:
            target = target[step]


def _spell(steps: list[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
