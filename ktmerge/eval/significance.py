"""Whether a difference is more than chance: McNemar, Holm, power, the luck of the best. Knows arrays of item scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum, lgamma, log
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class McNemar:
    """Items only A got right, items only B got right, and the two-sided p of so uneven a split by chance."""

    only_a: int
    only_b: int
    p: float


def mcnemar(a: NDArray[np.float64], b: NDArray[np.float64]) -> McNemar:
    """The exact McNemar test of two models' right and wrong answers on the same items [items].

    Under no difference each discordant item falls to either side like a coin; p = min(1, 2 P(X <= the smaller side)).
    """
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, few = only_a + only_b, min(only_a, only_b)
    chances = (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2) for k in range(few + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * fsum(exp(chance) for chance in chances)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979), in their order: below 0.05, all of those hold together."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def detectable(error: float) -> float:
    """The difference seen with 80 % power by a two-sided test at 5 %, given a difference's standard error.

    (z(0.975) + z(0.8)) times the error, in its unit.
    """
    return (NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)) * error


def luck(candidates: int, error: float) -> float:
    """How much better than itself the best of equal candidates looks: the expected largest of normal errors.

    By Blom's approximation of the expected maximum of n standard normals, z((n - 0.375) / (n + 0.25)).
    """
    if candidates < 2:
        return 0.0
    return NormalDist().inv_cdf((candidates - 0.375) / (candidates + 0.25)) * error
