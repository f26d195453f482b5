"""One worker's buffers: reads rows of raw elements into them and calls the compiled kernels on them. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.kernels.codes import BF16, BLOCK, ELECT, F16, F32, FINE, SUM
from ktmerge.merge.kernels.search import BINS, Interval
from ktmerge.merge.program import Elect, Sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.checkpoints import Reader
    from ktmerge.merge.kernels.native import Native
    from ktmerge.merge.steps import Steps

KINDS = {"BF16": BF16, "F16": F16, "F32": F32}
"""Codes of the types that the kernels read and write."""
WIDTHS = {BF16: 2, F16: 2, F32: 4}
_LINE = 64


@dataclass(frozen=True)
class Row:
    """One tensor of one checkpoint; ``kind`` is the code of its type."""

    reader: Reader
    name: str
    kind: int

    @property
    def width(self) -> int:
        """Bytes an element."""
        return WIDTHS[self.kind]


@dataclass(frozen=True)
class Measured:
    """What one piece has for a `Search`; valid until the workspace is used again.

    Attributes:
        counts, lows: for `Search.add`.
        places: uint32, indices in the piece of the magnitudes in the interval; None if there was no room.
        patterns: uint32, their patterns.
    """

    counts: NDArray[Any]
    lows: NDArray[Any]
    places: NDArray[np.uint32] | None
    patterns: NDArray[np.uint32] | None


@dataclass(frozen=True)
class Blended:
    """One piece as the kernel made it.

    Attributes:
        status: FINE, or why the piece cannot be used.
        data: bytes in the output's type; valid until the workspace is used again.
        sums: fp64 ``[4]``, as the kernel says.
        kept: int64 ``[N]``.
    """

    status: int
    data: memoryview
    sums: NDArray[np.float64]
    kept: NDArray[np.int64]


class Workspace:
    """Buffers that grow with what is asked of them; used by one thread at a time."""

    def __init__(self, native: Native, experts: int) -> None:
        self._native = native
        self._experts = experts
        self._rows = np.empty(0, np.uint8)
        self._stride = 0
        self._out = np.empty(0, np.uint8)
        self._kinds = np.zeros(experts + 1, np.int64)
        self._scratch = np.empty((2 * experts + 7) * BLOCK, np.uint32)
        self._counts, self._lows = np.zeros(BINS + 1, np.uint32), np.zeros(BINS, np.uint32)
        self._places, self._patterns = np.empty(0, np.uint32), np.empty(0, np.uint32)
        self._held: tuple[str, int, int] | None = None
        self._number, self._count, self.start = 0, 0, 0

    @cached_property
    def probe(self) -> Workspace:
        """Another one, to look at something without losing what is held here."""
        return Workspace(self._native, self._experts)

    def hold(self, rows: Sequence[Row], start: int, stop: int) -> None:
        """Read the same elements of all rows, the base's first, unless they are here already."""
        wanted = (rows[0].name, start, stop)
        if self._held == wanted:
            return
        self._held = None
        self._number, self._count, self.start = len(rows) - 1, stop - start, start
        width = max(row.width for row in rows)
        self._stride = -(-self._count * width // _LINE) * _LINE
        if self._rows.size < self._stride * len(rows):
            self._rows = np.empty(self._stride * len(rows), np.uint8)
        for number, row in enumerate(rows):
            begin = number * self._stride
            self._kinds[number] = row.kind
            row.reader.read_into(row.name, start, self._rows[begin : begin + self._count * row.width].data)
        self._held = wanted

    def equal(self) -> bool:
        """Whether all experts equal the base byte for byte; they have its type."""
        size = self._count * WIDTHS[int(self._kinds[0])]
        base = self._rows[:size]
        return all(
            np.array_equal(base, self._rows[number * self._stride : number * self._stride + size])
            for number in range(1, self._number + 1)
        )

    def energy(self) -> float | None:
        """The base's squared norm; None if it is not finite somewhere."""
        sums = np.zeros(4)
        status = self._native.energy(
            self._rows.ctypes.data, self._rows.ctypes.data, int(self._kinds[0]), self._count, sums.ctypes.data,
            self._scratch.ctypes.data,
        )  # fmt: skip
        return float(sums[1]) if status == FINE else None

    def measure(self, row: int, steps: Steps, position: int, interval: Interval, room: int = 0) -> Measured | None:
        """Count one row's deltas before the step at ``position``, and note up to ``room`` of those in the interval.

        None if an input is not finite.
        """
        if self._places.size < room:
            self._places, self._patterns = np.empty(room, np.uint32), np.empty(room, np.uint32)
        taken = np.zeros(1, np.int64)
        counts, lows = self._counts[: interval.bins + 1], self._lows[: interval.bins]
        counts.fill(0)
        lows.fill(0)
        status = self._native.measure(
            *self._inputs(), row, self._count, self.start, *steps.arguments(position),
            int(interval.hashed), interval.floor, steps.key(position, row - 1), interval.low, interval.last,
            interval.shift, interval.bins, counts.ctypes.data, lows.ctypes.data,
            room, self._places.ctypes.data, self._patterns.ctypes.data, taken.ctypes.data, self._scratch.ctypes.data,
        )  # fmt: skip
        if status != FINE:
            return None
        found = int(taken[0])
        if interval.hashed or found > room:
            return Measured(counts, lows, None, None)
        return Measured(counts, lows, self._places[:found], self._patterns[:found])

    def sample(self, row: int, steps: Steps, position: int) -> NDArray[np.uint32]:
        """Magnitude patterns of one row's deltas before the step at ``position``; the piece is a `BLOCK` at most."""
        out = np.empty(self._count, np.uint32)
        self._native.sample(
            *self._inputs(), row, self._count, self.start, *steps.arguments(position), out.ctypes.data,
            self._scratch.ctypes.data,
        )  # fmt: skip
        return out

    def blend(
        self, steps: Steps, combine: Sum | Elect, lambda_: float, kind: int, stochastic: bool, round_key: int
    ) -> Blended:
        """Blend what is held."""
        width = WIDTHS[kind]
        if self._out.size < self._count * width:
            self._out = np.empty(self._count * width, np.uint8)
        out, rows = self._out.ctypes.data, self._number
        weights = np.array(combine.weights, np.float32)
        votes = np.array(combine.votes if isinstance(combine, Elect) else combine.weights, np.float32)
        sums, kept = np.zeros(4), np.zeros(rows, np.int64)
        status = self._native.blend(
            *self._inputs(), self._count, self.start, *steps.arguments(len(steps)),
            ELECT if isinstance(combine, Elect) else SUM, votes.ctypes.data, weights.ctypes.data, lambda_,
            kind, int(stochastic), round_key, out, out, sums.ctypes.data, kept.ctypes.data, self._scratch.ctypes.data,
        )  # fmt: skip
        return Blended(status, self._out[: self._count * width].data, sums, kept)

    def _inputs(self) -> tuple[int, ...]:
        address = self._rows.ctypes.data
        return address, address, self._stride, self._kinds.ctypes.data, self._number
