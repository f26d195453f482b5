"""Recipes and suites of earlier schema versions, brought to the present one step at a time.

A version is raised when a valid file would be refused, or mean something else. The step from the version before is then
added here, and stays for good: what was shared once can be read for ever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from ktmerge.errors import UsageError

Document = dict[str, Any]
Step = Callable[[Document], Document]

RECIPE_STEPS: dict[int, Step] = {}
"""By the version they start from; each gives a document of the next version. Version 1 is the first."""

SUITE_STEPS: dict[int, Step] = {}


def migrated(document: Mapping[str, Any], key: str, present: int, steps: Mapping[int, Step], where: str) -> Document:
    """A document in the present version.

    Args:
        document: as it was read; not changed.
        key: what its version stands under.
        present: the version this ktmerge knows.
        steps: from each earlier version to the next.
        where: names it in messages.

    Raises:
        UsageError: its version is no number, newer than ``present``, or older than any that was published.
    """
    written = document.get(key, present)
    if isinstance(written, bool) or not isinstance(written, int):
        raise UsageError(f"{where}: {key}: the schema version is a number, e.g. {present}, not {written!r}.")
    if written > present:
        raise UsageError(
            f"{where}: written for schema version {written}, this ktmerge knows {present}: it would not understand all "
            "of it, and may do something else than was meant. Upgrade ktmerge."
        )
    first = min([present, *steps])
    if written < first:
        raise UsageError(f"{where}: {key}: there never was a version {written}; the first is {first}.")
    found = copy.deepcopy(dict(document))
    for version in range(written, present):
        found = {**steps[version](found), key: version + 1}
    return found
