"""``--set blend.lambda=0.8``: change any key of a recipe from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.recipes.document import parse_yaml

_PLAIN = r'[^.\[\]"]+'
_STEP = re.compile(rf'(?:^|\.)(?:({_PLAIN})|"([^"]+)")|\[(\d{{1,9}})\]')


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
    """``blend.where[0].lambda`` or ``experts."qwen2.5".weight`` as its steps; empty if it is not written so."""
    steps: list[str | int] = []
    position = 0
    for match in _STEP.finditer(path):
        if match.start() != position:
            return []
        steps.append(int(match[3]) if match[3] else match[1] or match[2])
        position = match.end()
    return steps if position == len(path) and steps and isinstance(steps[0], str) else []


def key_of(*steps: str | int) -> str:
    """The path with these steps, as `steps_of` reads it: names with a dot are in quotes."""
    spelt = (step if isinstance(step, int) or re.fullmatch(_PLAIN, step) else f'"{step}"' for step in steps)
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in spelt).removeprefix(".")


def _assign(target: Any, steps: list[str | int], value: Any, where: str) -> None:
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(step, int):
            if not isinstance(target, list) or step >= len(target):
                raise UsageError(f"{where}: there is no item [{step}] in {key_of(*steps[:i])}.")
        elif not isinstance(target, dict):
            raise UsageError(f"{where}: {key_of(*steps[:i])} has no keys inside.")
        elif quoted := _quoted(target, steps, i):
            raise UsageError(f"{where}: a name with a dot goes in quotes: '{quoted}'.")
        elif not last and target.get(step) is None:
            target[step] = {}
        if last:
            target[step] = value
        else:
            target = target[step]


def _quoted(target: dict[str, Any], steps: list[str | int], i: int) -> str:
    """The path that was meant where a name in ``target`` was taken apart at its dots; empty if none was."""
    rest = [str(step) for step in steps[i:]]
    for name in target if rest[0] not in target else ():
        count = name.count(".") + 1
        if count > 1 and ".".join(rest[:count]) == name:
            return key_of(*steps[:i], name, *steps[i + count :])
    return ""
