"""The bins of a histogram of ratios: fine where they are small whole numbers, of equal relative width beyond."""

from __future__ import annotations

import math

FINENESS = 7
"""Leading bits of a ratio's fraction that tell bins apart: whole numbers below 2**8 have bins of their own."""
LEAST, MOST = -16, 32
"""Powers of two between which ratios have bins; what is beyond goes into the first or last."""
BINS = ((MOST - LEAST) << FINENESS) + 3
"""0: a ratio of 0; 1: other ratios below 2**LEAST; the last: 2**MOST and above."""


def lower_edge(place: int) -> float:
    """The least ratio of a bin; that of the first two is 0."""
    if place < 2:
        return 0.0
    octave, step = divmod(place - 2, 1 << FINENESS)
    return math.ldexp(1 + step / (1 << FINENESS), LEAST + octave)
