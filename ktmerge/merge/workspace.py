"""One worker's buffers: reads rows of raw elements into them and calls the compiled kernels on them. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.kernels.codes import (
    BF16,
    BLOCK,
    ELECT_LARGEST,
    ELECT_MEAN,
    ELECT_SUM,
    F16,
    F32,
    FINE,
    GIVEN,
    LARGEST,
    MOST,
    SUM,
    UNREADABLE,
    WINDOW,
)
from ktmerge.merge.kernels.search import BINS, Interval
from ktmerge.merge.program import Elect, Given, Largest, Ruled, Sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.checkpoints.reader import Reader
    from ktmerge.merge.kernels.native import Entry, Native
    from ktmerge.merge.steps import Steps

KINDS = {"BF16": BF16, "F16": F16, "F32": F32}
"""Codes of the types that the kernels read and write."""
WIDTHS = {BF16: 2, F16: 2, F32: 4}
_NOTED = 1 << 17
"""Elements of a piece that can always be noted."""
_SPARE = 8
"""How many times as many as are expected can be."""
_DIGITS = 1 << 11
"""Words that ranks count digits in."""
_LINE = 64
_PART = 1 << 15
"""Elements of base and deltas that are worked on as fp32 arrays: they stay in the processor's second cache."""
_ELECTIONS = {"mean": ELECT_MEAN, "sum": ELECT_SUM, "largest": ELECT_LARGEST}
Combine = Sum | Largest | Elect | Given


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

    @cached_property
    def place(self) -> tuple[int, int] | None:
        """Descriptor and first byte, if the tensor lies in a file as it is."""
        found = self.reader.place(self.name)
        return None if found is None else found[:2]


@dataclass(frozen=True)
class Noted:
    """Elements of a piece that begins with the tensor's element ``start``; ``key`` is of the hash of the tensor.

    Attributes:
        places: uint32, indices in the piece.
        patterns: uint32, of their magnitudes.
        above: how many elements have larger magnitudes than those that were to be noted.
    """

    places: NDArray[np.uint32]
    patterns: NDArray[np.uint32]
    start: int
    key: int
    above: int


@dataclass(frozen=True)
class Target:
    """How a tensor is stored.

    Attributes:
        kind: the code of its type.
        stochastic: whether values are rounded by chance, of the stream ``key``.
        lambda_: last factor of the merged delta.
        factor: what it is multiplied by before that.
        limit: its largest magnitude in between.
    """

    kind: int
    stochastic: bool
    key: int
    lambda_: float
    factor: float = 1.0
    limit: float = inf


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
    """Buffers that grow with what is asked of them; used by one thread at a time.

    Attributes:
        native: the compiled kernels.
        start: of what is held, the first element's index in its tensor.
        count: how many elements are held.
    """

    def __init__(self, native: Native, experts: int) -> None:
        self.native = native
        self._experts = experts
        self._rows = np.empty(0, np.uint8)
        self._stride = 0
        self._out = np.empty(0, np.uint8)
        self._kinds = np.zeros(experts + 1, np.int64)
        self._files, self._places = np.full(experts + 1, -1, np.int64), np.zeros(experts + 1, np.int64)
        # As much as the neediest kernel asks for.
        self._scratch = np.empty((2 * experts + 7) * BLOCK + 2 * experts + 2, np.uint32)
        most = 2 * experts  # thresholds that are looked for at once
        self._counts, self._lows = np.zeros((most, BINS + 1), np.uint32), np.zeros((most, BINS), np.uint32)
        self._noted, self._patterns = np.empty((2, most, 0), np.uint32)
        self._keys, self._digits = np.empty(0, np.uint64), np.empty(_DIGITS, np.int64)
        self._arrays, self._halves = np.empty((0, 0), np.float32), np.empty(0)
        self._ruled, self.is_finite = np.empty((2, 0), np.float32), True
        self._wanted: Sequence[Row] = ()
        self._held = False
        self.count, self.start = 0, 0

    @cached_property
    def probe(self) -> Workspace:
        """Another one, to look at something without losing what is held here."""
        return Workspace(self.native, self._experts)

    def hold(self, rows: Sequence[Row], start: int, stop: int) -> None:
        """Turn to the same elements of all rows, the base's first. They are read when they are needed."""
        if self._wanted is rows and (self.start, self.count) == (start, stop - start):
            return
        self._wanted, self._held = rows, False
        self.count, self.start = stop - start, start
        for number, row in enumerate(rows):
            self._kinds[number] = row.kind
            file, begin = row.place or (-1, 0)
            self._files[number], self._places[number] = file, begin + start * row.width
        if (self._files < 0).any():
            self._files[0] = -1
        self._make_room(min(WINDOW, self.count))

    def _make_room(self, elements: int) -> None:
        """Buffers for so many elements of every row."""
        width = max(row.width for row in self._wanted)
        self._stride = -(-elements * width // _LINE) * _LINE
        if self._rows.size < self._stride * len(self._wanted):
            self._rows = np.empty(self._stride * len(self._wanted), np.uint8)

    def _read(self) -> None:
        """Read all rows now, and tell the kernels that they need not."""
        if self._held:
            return
        self._make_room(self.count)
        for number, row in enumerate(self._wanted):
            begin = number * self._stride
            row.reader.read_into(row.name, self.start, self._rows[begin : begin + self.count * row.width].data)
        self._files[0] = -1
        self._held = True

    def _call(self, kernel: Entry, *arguments: Any) -> int:
        """Let a kernel work on the rows, which it reads by itself where they lie in files as they are."""
        if self._files[0] < 0:
            self._read()
        status = kernel(*self._inputs(), *arguments)
        if status != UNREADABLE:
            return status
        self._read()  # says what is wrong, or reads it after all
        return kernel(*self._inputs(), *arguments)

    def equal(self) -> bool:
        """Whether all experts equal the base byte for byte; they have its type."""
        self._read()
        size = self.count * WIDTHS[int(self._kinds[0])]
        base = self._rows[:size]
        return all(
            np.array_equal(base, self._rows[number * self._stride : number * self._stride + size])
            for number in range(1, self._experts + 1)
        )

    def energy(self) -> float | None:
        """The base's squared norm; None if it is not finite somewhere."""
        self._read()
        sums = np.zeros(4)
        status = self.native.energy(
            self._rows.ctypes.data, self._rows.ctypes.data, int(self._kinds[0]), self.count, sums.ctypes.data,
            self._scratch.ctypes.data,
        )  # fmt: skip
        return float(sums[1]) if status == FINE else None

    def measure(
        self, steps: Steps, position: int, wanted: Sequence[tuple[int, Interval]]
    ) -> list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] | None:
        """Counts and lows of experts' deltas before the step at ``position``, for `Search.add`.

        Valid until the workspace is used again; None if an input is not finite.

        Args:
            steps: the transforms.
            position: of one of them.
            wanted: number of the expert, and interval; at most two of one expert, one after the other.
        """
        rows = np.array([expert + 1 for expert, _ in wanted], np.int64)
        searches = np.array(
            [
                (one.hashed, one.floor, steps.key(position, expert), one.low, one.last, one.shift, one.bins)
                for expert, one in wanted
            ],
            np.uint64,
        )
        for number, (_, interval) in enumerate(wanted):
            self._counts[number, : interval.bins + 1] = 0
            self._lows[number, : interval.bins] = 0
        status = self._call(
            self.native.measure, self.count, self.start, *steps.arguments(position),
            len(wanted), rows.ctypes.data, searches.ctypes.data, BINS, self._counts.ctypes.data, self._lows.ctypes.data,
            self._scratch.ctypes.data,
        )  # fmt: skip
        if status != FINE:
            return None
        return [
            (self._counts[number, : interval.bins + 1], self._lows[number, : interval.bins])
            for number, (_, interval) in enumerate(wanted)
        ]

    def note(
        self, steps: Steps, position: int, wanted: Sequence[tuple[int, Interval, float]]
    ) -> list[Noted | None] | None:
        """The elements of experts' deltas, before the step at ``position``, whose magnitudes are in an interval.

        None for those of which there are too many; None if an input is not finite.

        Args:
            steps: the transforms.
            position: of one of them.
            wanted: as for `measure`, with the share of all elements that is expected in the interval.
        """
        share = max(expected for *_, expected in wanted)
        room = min(self.count, max(_NOTED, int(_SPARE * share * self.count))) + BLOCK
        if self._noted.shape[1] < room:
            self._noted, self._patterns = np.empty((2, 2 * self._experts, room), np.uint32)
        rows = np.array([expert + 1 for expert, *_ in wanted], np.int64)
        bounds = np.array([(one.low, one.last) for _, one, _ in wanted], np.uint32)
        taken, above = np.zeros((2, len(wanted)), np.int64)
        status = self._call(
            self.native.note, self.count, self.start, *steps.arguments(position), len(wanted), rows.ctypes.data,
            bounds.ctypes.data, self._noted.shape[1], self._noted.ctypes.data, self._patterns.ctypes.data,
            taken.ctypes.data, above.ctypes.data, self._scratch.ctypes.data,
        )  # fmt: skip
        if status != FINE:
            return None
        found: list[Noted | None] = []
        for number, (expert, *_) in enumerate(wanted):
            count = int(taken[number])
            if count > self._noted.shape[1]:
                found.append(None)
                continue
            places, patterns = self._noted[number, :count].copy(), self._patterns[number, :count].copy()
            found.append(Noted(places, patterns, self.start, steps.key(position, expert), int(above[number])))
        return found

    def rank_noted(self, noted: Sequence[Noted], rank: int, interval: Interval) -> tuple[int, int, int]:
        """The ``rank``-th largest pattern, from 1 on; how many are larger, and how many equal."""
        patterns = np.concatenate([one.patterns for one in noted])
        if self._keys.size < patterns.size:
            self._keys = np.empty(patterns.size, np.uint64)
        decision = np.zeros(3, np.int64)
        self.native.rank_noted(
            patterns.ctypes.data, patterns.size, rank, interval.low, interval.last.bit_length(), self._keys.ctypes.data,
            self._digits.ctypes.data, decision.ctypes.data,
        )  # fmt: skip
        floor, larger, equal = decision.tolist()
        return floor, larger, equal

    def rank_hashes(self, noted: Sequence[Noted], floor: int, rank: int) -> int:
        """Of the elements that have the magnitude ``floor`` the ``rank``-th largest hash, from 1 on."""
        size = sum(one.places.size for one in noted)
        if self._keys.size < size:
            self._keys = np.empty(size, np.uint64)
        count = 0
        for one in noted:
            count += self.native.hash_noted(
                one.places.ctypes.data, one.patterns.ctypes.data, one.places.size, floor, one.key, one.start,
                self._keys[count:].ctypes.data,
            )  # fmt: skip
        least = np.zeros(1, np.uint64)
        self.native.rank_hashes(
            self._keys.ctypes.data, count, rank, self._digits.ctypes.data, least.ctypes.data
        )  # fmt: skip
        return int(least[0])

    @property
    def kinds(self) -> list[int]:
        """Codes of the rows' types."""
        return [row.kind for row in self._wanted]

    def addresses(self, begin: int) -> list[int]:
        """Of an element of every row, counted from what is held; they were read."""
        first = self._rows.ctypes.data
        return [first + number * self._stride + begin * row.width for number, row in enumerate(self._wanted)]

    def parts(self, steps: Steps, kept: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.float32]]:
        """Base and deltas after the transforms, fp32 ``[N + 1, n]``, some elements of what is held at a time.

        Each is valid until the next. Where an input is not finite they end, and `is_finite` says so. ``kept`` takes how
        many elements of each delta the transforms leave.
        """
        self._read()
        rows = self._experts + 1
        if not self._arrays.size:
            self._arrays = np.empty((rows, _PART), np.float32)
            self._halves = np.empty(2 * rows * BLOCK)
            self._ruled = np.empty((2, _PART), np.float32)
        widths = [row.width for row in self._wanted]
        kept = np.zeros(self._experts, np.int64) if kept is None else kept
        self.is_finite = True
        for begin in range(0, self.count, _PART):
            size = min(_PART, self.count - begin)
            pairs = zip(self.addresses(begin), widths, strict=True)
            places = np.array([address // width for address, width in pairs], np.int64)
            part = self._arrays.reshape(-1)[: rows * size].reshape(rows, size)
            status = self.native.spread(
                0, 0, self._kinds.ctypes.data, places.ctypes.data, self._experts, size, self.start + begin,
                *steps.arguments(len(steps)), part.ctypes.data, kept.ctypes.data, self._scratch.ctypes.data,
            )  # fmt: skip
            if status != FINE:
                self.is_finite = False
                return
            yield part

    def ruled(self, rule: Ruled, part: NDArray[np.float32], begin: int = 0) -> NDArray[np.float32]:
        """What a rule makes of a part whose first element is ``begin``, counted from what is held; until the next."""
        size = part.shape[1]
        known = np.empty((len(rule.known), size), np.float32)
        for (reader, name), row in zip(rule.known, known, strict=True):
            reader.read_into(name, self.start + begin, row.view(np.uint8).data)
        self.native.rule(
            rule.rule, part.ctypes.data, self._experts, size, rule.told.ctypes.data, len(known), known.ctypes.data,
            self._ruled[0].ctypes.data, self._ruled[1].ctypes.data,
        )  # fmt: skip
        made: NDArray[np.float32] = self._ruled[1][:size]
        return made

    def tally(
        self, values: NDArray[np.float32] | NDArray[np.uint32], low: int, shift: int, counts: NDArray[np.int64]
    ) -> None:
        """How many magnitudes, of numbers or patterns, are in bins of ``2**shift`` from ``low`` on, and above them."""
        bins = counts.size - 1
        self.native.tally(
            values.ctypes.data, values.size, low, (bins << shift) - 1, shift, bins, counts.ctypes.data
        )  # fmt: skip

    def add_squares(self, values: NDArray[np.float32], bins: NDArray[np.uint64]) -> None:
        """Squares of fp32 values by exponent, added to ``bins`` ``[2, 256]``."""
        self.native.add_up(values.ctypes.data, values.size, 2, bins.ctypes.data)

    def add_products(
        self, order: Sequence[int], part: NDArray[np.float32], units: NDArray[np.float64], sums: NDArray[np.int64]
    ) -> None:
        """Inner products of the rows of a part, in another order with the base last, added to ``sums``."""
        places = np.array([part[row].ctypes.data // 4 for row in order], np.int64)
        self.native.products(
            0, places.ctypes.data, len(order), 1, part.shape[1], units.ctypes.data, sums.ctypes.data,
            self._halves.ctypes.data,
        )  # fmt: skip

    def sample(self, steps: Steps, position: int, blocks: Sequence[int]) -> NDArray[np.uint32] | None:
        """Magnitude patterns of all experts' deltas before the step at ``position``, in blocks of what is held.

        Args:
            steps: the transforms.
            position: of one of them.
            blocks: their first elements, counted from what is held; that is a `BLOCK` at most, the first of them.

        Returns:
            ``[N, blocks, elements]``; None if an input is not finite.
        """
        out = np.empty((len(blocks), self._experts, self.count), np.uint32)
        if self._files[0] >= 0:
            fine = self._sample(steps, position, blocks, out)
        else:
            rows, count = self._wanted, self.count
            fine = True
            for number, block in enumerate(blocks):
                self.hold(rows, block, block + count)
                self._read()
                fine = fine and self._sample(steps, position, [0], out[number : number + 1])
        return out.swapaxes(0, 1) if fine else None

    def _sample(self, steps: Steps, position: int, blocks: Sequence[int], out: NDArray[np.uint32]) -> bool:
        firsts = np.array(blocks, np.int64)
        status = self.native.sample(
            *self._inputs(), self.count, self.start, *steps.arguments(position), len(blocks), firsts.ctypes.data,
            out.ctypes.data, self._scratch.ctypes.data,
        )  # fmt: skip
        return bool(status == FINE)

    def squares(self, steps: Steps, combine: Combine) -> NDArray[np.uint64] | None:
        """Sums of squares of base and merged delta by exponent, as the kernel says; None if one is not finite."""
        code, counted, rates, fallback = spelled(combine)
        bins, kept = np.zeros((2, 2, 256), np.uint64), np.zeros(self._experts, np.int64)
        status = self._call(
            self.native.squares, self.count, self.start, *steps.arguments(len(steps)), code, counted,
            rates.ctypes.data, fallback, bins.ctypes.data, kept.ctypes.data, self._scratch.ctypes.data,
        )  # fmt: skip
        return bins if status == FINE else None

    def blend(self, steps: Steps, combine: Combine, target: Target) -> Blended:
        """Blend what is held."""
        size = self.count * WIDTHS[target.kind]
        if self._out.size < size:
            self._out = np.empty(size, np.uint8)
        out = self._out.ctypes.data
        code, counted, rates, fallback = spelled(combine)
        sums, kept = np.zeros(4), np.zeros(self._experts, np.int64)
        if self._has_own_loop(steps, combine, target):
            status = self._call(
                self.native.elect, self.count, self.start, *steps.arguments(1), int(code == ELECT_MEAN),
                rates.ctypes.data, fallback, target.lambda_, out, sums.ctypes.data, kept.ctypes.data,
                self._scratch.ctypes.data,
            )  # fmt: skip
        else:
            ends = np.array([fallback, target.factor, target.limit, target.lambda_], np.float32)
            status = self._call(
                self.native.blend, self.count, self.start, *steps.arguments(len(steps)), code, counted,
                rates.ctypes.data, ends.ctypes.data, target.kind, int(target.stochastic), target.key, out, out,
                sums.ctypes.data, kept.ctypes.data, self._scratch.ctypes.data,
            )  # fmt: skip
        return Blended(status, self._out[:size].data, sums, kept)

    def _has_own_loop(self, steps: Steps, combine: Combine, target: Target) -> bool:
        """Whether it is an election among bf16 rows for which there is a loop of its own."""
        if not isinstance(combine, Elect) or combine.counted or combine.aggregate == "largest":
            return False
        nearest = target.kind == BF16 and not target.stochastic and target.factor == 1 and target.limit == inf
        plain = len(steps) <= 1 and not steps.has_outliers and self._experts <= MOST
        return nearest and plain and all(row.kind == BF16 for row in self._wanted)

    def _inputs(self) -> tuple[int, ...]:
        address, files, places = self._rows.ctypes.data, self._files.ctypes.data, self._places.ctypes.data
        return address, address, self._stride, self._kinds.ctypes.data, self._experts, files, places


def spelled(combine: Combine) -> tuple[int, int, NDArray[np.float32], float]:
    """Code, whether signs are counted, votes, weights and shares ``[3, N]``, and the vote where that is even."""
    if isinstance(combine, Elect):
        rates = np.array([combine.votes, combine.weights, combine.shares], np.float32)
        return _ELECTIONS[combine.aggregate], int(combine.counted), rates, combine.fallback
    if isinstance(combine, Given):
        return GIVEN, 0, np.zeros((3, 0), np.float32), 0.0
    code = LARGEST if isinstance(combine, Largest) else SUM
    return code, 0, np.array([combine.weights] * 3, np.float32), 0.0
