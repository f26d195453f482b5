"""Points with two numbers, of both of which more is better: who is beaten, and how much a front covers."""

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


def hypervolume(points: Array) -> Array:
    """Area between (0, 0) and the staircase over the points ``[n, 2, ...]``; what is below 0 counts as 0."""
    first, second = np.maximum(points[:, 0], 0), np.maximum(points[:, 1], 0)
    order = np.argsort(-first, axis=0, kind="stable")
    wide, high = np.take_along_axis(first, order, 0), np.take_along_axis(second, order, 0)
    steps = wide - np.concatenate([wide[1:], np.zeros_like(wide[:1])])
    return np.asarray((steps * np.maximum.accumulate(high, axis=0)).sum(axis=0))
