"""What expert weights mean to methods whose formulas have none. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence


def relative(weights: Sequence[float]) -> list[float]:
    """Weights over the mean of their magnitudes, so that equal ones are exactly 1 and negative ones subtract."""
    if len(set(weights)) == 1 and weights[0] > 0:
        return [1.0] * len(weights)
    mean = sum(abs(weight) for weight in weights) / len(weights)
    return [weight / mean for weight in weights]
