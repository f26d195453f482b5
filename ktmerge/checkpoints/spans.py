"""Which bytes of something have arrived, as disjoint ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Spans:
    """A set of byte positions, added range by range in any order; neighbours are joined. Not locked."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Add the positions ``[start, stop)``."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    @property
    def prefix(self) -> int:
        """How many positions are there without a gap from 0 on."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Those of the positions ``[start, stop)`` that are there, as ranges in order."""
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        for begins, ends in zip(self._starts[first:last], self._stops[first:last], strict=True):
            yield max(start, begins), min(stop, ends)

    def count(self, start: int, stop: int) -> int:
        """How many of the positions ``[start, stop)`` are there."""
        return sum(ends - begins for begins, ends in self.ranges(start, stop))
