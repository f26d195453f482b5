"""The value of sums that were taken without rounding, by exponent. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

HALF = 24
"""Bits in the lower half of a squared mantissa."""


def exact_value(bins: Iterable[int], power: int) -> Fraction:
    """The sum of ``|x| ** power`` over fp32 values, given that of their 24-bit mantissas' powers for each exponent."""
    unit = Fraction(1, 1 << (150 * power))
    return unit * sum(count << (exponent * power) for exponent, count in enumerate(bins))
