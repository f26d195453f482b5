"""What expert weights mean to methods whose formulas have none, and what they cannot be. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def relative(weights: Sequence[float]) -> list[float]:
    """Weights over the mean of their magnitudes, so that equal ones are exactly 1 and negative ones subtract."""
    if len(set(weights)) == 1 and weights[0] > 0:
        return [1.0] * len(weights)
    mean = sum(abs(weight) for weight in weights) / len(weights)
    return [weight / mean for weight in weights]


def positive(parameters: Any, weights: Mapping[str, float]) -> str | None:
    """Objection to weights that are no shares of anything."""
    if min(weights.values()) < 0 or max(weights.values()) <= 0:
        return "expert weights are shares here: 0 or more, one of them positive; use task_arithmetic to subtract"
    return None
