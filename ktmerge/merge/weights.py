"""What expert weights mean to methods whose formulas have none, and what they cannot be. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def used(items: Iterable[Item], weights: Sequence[float]) -> list[Item]:
    """Those of the experts whose weight is not 0."""
    return [item for item, weight in zip(items, weights, strict=True) if weight]


def relative(weights: Sequence[float]) -> list[float]:
    """Weights over the mean of their magnitudes, so that equal ones are exactly 1 and negative ones subtract.

    Those of 0 are no part of the mean: such an expert might as well not be there.
    """
    own = used(weights, weights)
    if len(set(own)) == 1 and own[0] > 0:
        return [float(weight != 0) for weight in weights]
    mean = sum(abs(weight) for weight in own) / len(own)
    return [weight / mean for weight in weights]


def shares(weights: Iterable[float]) -> list[float]:
    """Weights over their sum."""
    given = list(weights)
    total = sum(given)
    return [weight / total for weight in given]


def any_weight(parameters: Any, weights: Mapping[str, float]) -> str | None:
    """Objection to weights that are all 0."""
    return None if any(weights.values()) else "all expert weights are 0; nothing would be merged"


def positive(parameters: Any, weights: Mapping[str, float]) -> str | None:
    """Objection to weights that are no shares of anything."""
    if min(weights.values()) < 0 or max(weights.values()) <= 0:
        return "expert weights are shares here: 0 or more, one of them positive; use task_arithmetic to subtract"
    return None
