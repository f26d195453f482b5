"""Points with two numbers, of both of which more is better: who is beaten."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def front(points: Array) -> list[int]:
    """Indices of the points ``[n, 2]`` that no other point beats on one side without losing on the other."""
    return [
        i
        for i, point in enumerate(points)
        if not any((other >= point).all() and (other > point).any() for other in points)
    ]


def layers(points: Array) -> list[list[int]]:
    """Indices of the points ``[n, 2]``: the front, then the front of what is left, and so on."""
    left, found = list(range(len(points))), []
    while left:
        own = [left[i] for i in front(points[left])]
        found.append(own)
        left = [i for i in left if i not in own]
    return found
