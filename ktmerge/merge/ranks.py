"""Which element, counted from the smallest, a quantile is. Loads no torch."""

from __future__ import annotations

import math

LOW_BITS = 16
"""Bits in the lower half of a magnitude's pattern: exact quantiles take one pass for each half."""


def quantile_rank(share: float, elements: int) -> int:
    """Rank, from the smallest and from 0, of the least value that ``share`` of the elements do not exceed."""
    return max(0, math.ceil(round(share * elements, 6)) - 1)
