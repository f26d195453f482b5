"""Where labels go so that they cover neither points, lines nor one another. Plain geometry in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, hypot, inf, pi, sin


@dataclass(frozen=True)
class Box:
    """A rectangle, x to the right, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area that both share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0

    def outside(self, frame: Box) -> float:
        """Area of this box that lies outside ``frame``."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(frame)


@dataclass(frozen=True)
class Label:
    """A text box of ``width`` x ``height`` that belongs to the point (x, y)."""

    x: float
    y: float
    width: float
    height: float


def square(x: float, y: float, size: float) -> Box:
    """A box around a point."""
    return Box(x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def along(points: Sequence[Sequence[float]], size: float = 3.0) -> list[Box]:
    """Small boxes that cover a polyline."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, int(hypot(x1 - x0, y1 - y0) / size))
        boxes += [square(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, size) for i in range(steps + 1)]
    return boxes


def place(labels: Sequence[Label], obstacles: Iterable[Box], frame: Box) -> list[Box]:
    """Find a box for each label, one after the other, each where it covers least.

    Labels in crowded places choose first. Tried are 16 directions at growing distance.
    """
    taken = list(obstacles)
    placed: dict[int, Box] = {}
    order = sorted(range(len(labels)), key=lambda i: -_crowd(labels, i))
    for i in order:
        placed[i] = _cheapest(labels[i], taken, list(placed.values()), frame)
    return [placed[i] for i in range(len(labels))]


def _crowd(labels: Sequence[Label], i: int) -> float:
    own = labels[i]
    return sum(1 / (10 + hypot(own.x - other.x, own.y - other.y)) for j, other in enumerate(labels) if j != i)


def _candidates(label: Label) -> Iterable[tuple[Box, float]]:
    for distance in (6.0, 10.0, 16.0, 24.0, 34.0, 46.0):
        for step in range(16):
            angle = 2 * pi * step / 16
            x = label.x + cos(angle) * distance + (cos(angle) - 1) / 2 * label.width
            y = label.y + sin(angle) * distance + (sin(angle) - 1) / 2 * label.height
            yield Box(x, y, x + label.width, y + label.height), distance


def _cheapest(label: Label, obstacles: list[Box], labels: list[Box], frame: Box) -> Box:
    """The first of the best places; one that is far or outside already is not held against what it covers."""
    best, least = Box(0.0, 0.0, 0.0, 0.0), inf
    for box, distance in _candidates(label):
        cost = 20 * box.outside(frame) + distance
        if cost < least:
            cost += 5 * sum(map(box.overlap, obstacles)) + 40 * sum(map(box.overlap, labels))
            if cost < least:
                best, least = box, cost
    return best
