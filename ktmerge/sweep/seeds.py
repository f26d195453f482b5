"""Candidates whose method draws by chance: several draws of each, so that no lucky mask wins. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ktmerge.recipes.schema import Recipe
from ktmerge.sweep.rounds import ItemScores


def drawn(recipe: Recipe, seeds: int) -> list[Recipe]:
    """The recipe with its own seed and those that follow it."""
    return [recipe.model_copy(update={"seed": recipe.seed + number}) for number in range(seeds)]


def mean_of(draws: Sequence[ItemScores]) -> ItemScores:
    """The mean of several draws' scores, item by item."""
    return {name: np.mean([one[name] for one in draws], axis=0).tolist() for name in draws[0]}
