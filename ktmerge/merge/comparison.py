"""Two recipes, locks or blends held against each other. Loads no torch."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.merge.difference import Difference, Effect, Side, differences
from ktmerge.merge.lock import FILE as LOCK
from ktmerge.merge.lock import read_lock
from ktmerge.merge.planning import plan_here
from ktmerge.recipes import load_recipe
from ktmerge.recipes.load import parse_recipe


@dataclass(frozen=True)
class Comparison:
    """All differences, what changes the output first."""

    first: str
    second: str
    differences: tuple[Difference, ...]

    @property
    def changes(self) -> Effect:
        """Whether the two give other weights."""
        found = {one.changes for one in self.differences}
        return "yes" if "yes" in found else "perhaps" if "perhaps" in found else "no"

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Columns, rows and title."""
        rows = [[one.what, one.first, one.second, one.changes, one.why] for one in self.differences]
        verdict = {
            "yes": "give other weights",
            "perhaps": "may give other weights",
            "no": "give the same weights" if rows else "say the same",
        }[self.changes]
        return ["what", self.first, self.second, "other weights", "why"], rows, f"the two {verdict}"

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "second": self.second,
            "changes_output": self.changes,
            "differences": [asdict(one) for one in self.differences],
        }


def compare(first: str, second: str) -> Comparison:
    """Hold two against each other.

    Args:
        first: a recipe file or gallery name, a lock, or the folder of a blend.
        second: likewise.

    Raises:
        UsageError: one is none of these, or its recipe is not valid.
    """
    found = differences(_side(first), _side(second))
    order = ("yes", "perhaps", "no")
    return Comparison(first, second, tuple(sorted(found, key=lambda each: order.index(each.changes))))


def _side(reference: str) -> Side:
    path, is_folder = Path(reference), os.path.isdir(reference)
    if is_folder or path.name.endswith((".lock.yaml", LOCK)):
        if is_folder and not (path / LOCK).exists():
            raise UsageError(f"{reference}: has no {LOCK}; give a recipe, a lock, or the folder of a blend.")
        lock = read_lock(path)
        recipe = parse_recipe(dict(lock["recipe"]), str(path), path if is_folder else path.absolute().parent)
        return Side(reference, recipe, lock, None)
    recipe = load_recipe(reference)
    return Side(reference, recipe, None, plan_here(recipe))  # one of the gallery has no models, but can be read
