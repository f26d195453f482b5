"""Exact selection of the k largest magnitudes, streaming, in fixed memory: a search over intervals of a key.

The key of an element is the 31-bit pattern of its fp32 magnitude, and among equal magnitudes (a fifth of all elements
in bf16 checkpoints) a 64-bit hash of its position: equals are decided by the hash, never by order. Each pass counts the
keys inside one interval, in at most 16384 bins, and those above it; the next interval is the bin that holds the k-th.
Loads no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 1 << 14
_MAGNITUDES, _HASHES = 1 << 31, 1 << 64
_CERTAIN = 8.0
"""Standard deviations within which the k-th of uniform hashes lies for certain."""
_LIKELY = 6.0
"""The same for magnitudes, by a sample. A miss costs a pass, never the result."""


@dataclass(frozen=True)
class Threshold:
    """The elements to keep: magnitude pattern larger than ``floor``, or just that and a hash of at least ``least``.

    Attributes:
        kept: how many that are.
        elements: out of how many.
    """

    floor: int
    least: int
    kept: int
    elements: int

    @property
    def keeps_all(self) -> bool:
        return self.kept >= self.elements

    @property
    def keeps_none(self) -> bool:
        return self.kept <= 0


@dataclass(frozen=True)
class Interval:
    """What one pass counts: keys from ``low`` on, ``bins`` bins of ``2**shift``; those below it are of no interest.

    ``hashed``: the keys are the hashes of the elements of magnitude ``floor``, else the magnitudes of all.
    """

    low: int
    shift: int
    bins: int
    hashed: bool = False
    floor: int = 0

    @property
    def last(self) -> int:
        """Largest offset from ``low`` that is counted in a bin; the key space ends the interval, too."""
        space = _HASHES if self.hashed else _MAGNITUDES
        return min(self.bins << self.shift, space - self.low) - 1


class Search:
    """Finds the threshold of the ``keep`` largest magnitudes among ``elements``; 192 KB whatever their number."""

    def __init__(self, keep: int, elements: int) -> None:
        self._keep, self._elements = keep, elements
        self._bins = min(BINS, max(256, 1 << (2 * elements).bit_length()))
        self._interval = _covering(0, _MAGNITUDES, self._bins)
        self._above = 0  # elements of larger magnitude than the floor; known once the keys are hashes
        self._expected = float(elements)
        self._result = Threshold(0, 0, keep, elements)
        self.done = keep <= 0 or keep >= elements
        self._counts: NDArray[np.int64]
        self._lows: NDArray[np.uint32]
        self._start_pass()

    @property
    def interval(self) -> Interval:
        """What to count next."""
        return self._interval

    @property
    def expected(self) -> float:
        """About how many elements are in the interval; as many as there are where that is not known."""
        return self._expected

    def hint(self, edges: NDArray[Any], below: NDArray[Any], size: int) -> None:
        """Begin where a sample of magnitude patterns says that the threshold is.

        Args:
            edges: patterns, ascending from 0 on.
            below: how many of the sample are smaller than each.
            size: of the sample.
        """
        share = self._keep / max(self._elements, 1)
        middle, reach = size * (1 - share), _LIKELY * math.sqrt(size * share * (1 - share)) + 2
        first = max(0, int(below.searchsorted(middle - reach, side="right")) - 1)
        last = int(below.searchsorted(middle + reach))
        low, high, count = int(edges[first]), _MAGNITUDES, size
        if last < edges.size:
            high, count = max(int(edges[last]), low + 1), int(below[last])
        self._interval = _covering(low, high, self._bins)
        self._expected = self._elements * min(1.0, (count - int(below[first]) + 1) / size)
        self._start_pass()

    def add(self, counts: NDArray[Any], lows: NDArray[Any] | None = None) -> None:
        """Take in what one piece has in each bin, and above the interval last: ``[bins + 1]``.

        Args:
            counts: numbers of elements.
            lows: ``[bins]``: the union of the bits that the magnitudes in a bin lose by the shift. A bin without any
                holds one value only, which saves the pass that would tell.
        """
        if self._counts.size == 0:  # only now: what is noted is not counted
            self._counts = np.zeros(self._interval.bins + 1, np.int64)
            self._lows = np.zeros(self._interval.bins, np.uint32)
        self._counts += counts
        if lows is None:
            self._lows.fill(1)
        else:
            self._lows |= lows

    def end_pass(self) -> None:
        """All pieces have been counted once: narrow the interval down to the bin that holds the last to keep."""
        interval, self._expected = self._interval, float(self._elements)
        wanted = self._keep - self._above - int(self._counts[-1])
        inside = self._counts[:-1]
        if wanted <= 0:
            self._interval = _covering(interval.low + interval.last + 1, self._space, self._bins, interval)
        elif wanted > int(inside.sum()):
            self._interval = _covering(0, interval.low, self._bins, interval)
        else:
            self._narrow(wanted, inside)
        self._start_pass()

    def rank_inside(self, above: int, inside: int) -> int | None:
        """Which of the interval's magnitudes, from the largest, is the last to keep; None if it lies elsewhere.

        The interval is then moved to where it lies.

        Args:
            above: how many elements are above the interval.
            inside: how many are in it.
        """
        interval, rank = self._interval, self._keep - above
        if 0 < rank <= inside:
            return rank
        edges = (interval.low + interval.last + 1, _MAGNITUDES) if rank <= 0 else (0, interval.low)
        self._interval, self._expected = _covering(*edges, self._bins), float(self._elements)
        self._start_pass()
        return None

    def settle(self, floor: int, least: int = 0) -> None:
        """End the search: what it was for is found."""
        self._result = Threshold(floor, least, self._keep, self._elements)
        self.done = True

    def result(self) -> Threshold:
        """Valid once done."""
        return self._result

    @property
    def _space(self) -> int:
        return _HASHES if self._interval.hashed else _MAGNITUDES

    def _start_pass(self) -> None:
        self._counts, self._lows = np.zeros(0, np.int64), np.zeros(0, np.uint32)

    def _narrow(self, wanted: int, inside: NDArray[Any]) -> None:
        above = inside[::-1].cumsum()  # elements in this bin or a higher one
        position = int(above.searchsorted(wanted))
        number = inside.size - 1 - position
        interval = self._interval
        low = interval.low + (number << interval.shift)
        count = int(inside[number])
        needed = wanted - (int(above[position]) - count)  # of those in the bin
        single = interval.shift == 0 or (not interval.hashed and not self._lows[number])
        if needed == count or (single and (interval.hashed or low == 0)):
            # Whether a zero is kept makes no difference, and no two elements of a tensor have the same hash.
            self.settle(*((interval.floor, low) if interval.hashed else (low, 0)))
        elif single:
            self._above = self._keep - needed
            self._interval = _expected(needed, count, self._bins, low)
        else:
            self._interval = _covering(low, low + (1 << interval.shift), self._bins, interval)
            self._expected = float(count)


def _covering(low: int, high: int, bins: int, like: Interval | None = None) -> Interval:
    """The interval of at most so many bins that holds all keys from ``low`` to below ``high``."""
    shift = max(0, (high - low - 1).bit_length() - (bins.bit_length() - 1))
    bins = -(-(high - low) >> shift)
    return Interval(low, shift, bins, like is not None and like.hashed, like.floor if like is not None else 0)


def _expected(needed: int, count: int, bins: int, floor: int) -> Interval:
    """Where the hash of the ``needed``-th largest of ``count`` elements is, as hashes are uniform."""
    share = 1 - needed / count
    reach = (_CERTAIN * math.sqrt(share * (1 - share) / count) + _CERTAIN / count) * _HASHES
    low = max(0, int(share * _HASHES - reach))
    high = min(_HASHES, int(share * _HASHES + reach) + 1)
    return _covering(low, high, bins, Interval(0, 0, 0, hashed=True, floor=floor))
