"""Points with two numbers, of both of which more is better: who is beaten."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def front(points: Array) -> list[int]:
    """Indices of the points ``[n, 2]`` that no other point beats on one side without losing on the other."""
    found: list[int] = []
    for i in np.lexsort((-points[:, 1], -points[:, 0])).tolist():  # by the first number, of equal ones by the second
        if not found or points[i, 1] > points[found[-1], 1] or (points[i] == points[found[-1]]).all():
            found.append(i)
    return sorted(found)


def layers(points: Array) -> Iterator[list[int]]:
    """Indices of the points ``[n, 2]``: the front, then the front of what is left, and so on."""
    left = np.arange(len(points))
    while len(left):
        own = front(points[left])
        yield left[own].tolist()
        left = np.delete(left, own)
