"""Candidates of a sweep: into the model in one call for all tensors, nothing measured. Loads no torch.

All that depends on the models alone is laid out once; of a candidate only its numbers are put into a table that the
kernel walks along: those of a plain change of one expert, or where a merged delta lies that was kept. What is not
covered here goes the other ways, and every result equals theirs bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ktmerge.checkpoints.workers import Workers
from ktmerge.merge.device import cores
from ktmerge.merge.inexact import Inexact, inexact_places
from ktmerge.merge.kernels.codes import COLUMNS, FINE, STRIP
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.order import Orders, Pools
from ktmerge.merge.program import Elect, Program, Sum, Trim, program_of
from ktmerge.merge.steps import edge
from ktmerge.merge.workspace import KINDS, WIDTHS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.kernels.native import Native
    from ktmerge.merge.merged import MergedDeltasOfPlan
    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.pristine import HostReader
    from ktmerge.merge.selection import Thresholds
    from ktmerge.merge.sinks import LiveSink

PIECE = 1 << 16
"""Elements of a piece; a multiple of a strip. What is widened of it stays in a core's second cache."""
_SHARES = 8
"""Parts of the work a worker: one that is held up leaves some to the others."""
# Columns of the kernel's table, see `codes`.
_FIRSTS, _COUNT, _START, _GIVEN, _CHOICE, _STOCHASTIC, _ROUND, _INEXACT = slice(4, 7), 7, 8, 9, slice(9, 13), 13, 14, 15


class MultiTensor:
    """The way of all plans with the same base and experts into one model.

    Args:
        plan: one of them.
        base: held in this process's memory.
        experts: likewise, in the plan's order.
        sink: the model.
        native: the compiled kernels.
    """

    def __init__(
        self, plan: Plan, base: HostReader, experts: Sequence[HostReader], sink: LiveSink, native: Native
    ) -> None:
        self._native, self._base, self._experts = native, base, experts
        self._names = [expert.name for expert in plan.experts]
        self._orders = Orders(base, experts[0], self._names[0], native)
        self._numbers: dict[str, int] = {}
        self._inexact: dict[int, Inexact | None] = {}
        self._round_keys: tuple[int, NDArray[np.int64]] | None = None
        self._keys: list[str] = []
        columns: list[list[int]] = []
        for tensor in plan.tensors:
            row = self._row(plan, tensor, sink)
            if row is not None:
                self._numbers[tensor.name] = len(columns)
                self._keys.append(tensor.key)
                columns.append(row)
        laid = np.array(columns, np.int64).reshape(-1, COLUMNS)
        counts = -(-laid[:, _COUNT] // PIECE)
        self._tensors = np.repeat(np.arange(len(laid)), counts)
        starts = PIECE * (np.arange(len(self._tensors)) - np.repeat(np.cumsum(counts) - counts, counts))
        self._table = laid[self._tensors]
        self._table[:, _FIRSTS] += starts[:, None]
        self._table[:, _COUNT] = np.minimum(PIECE, self._table[:, _COUNT] - starts)
        self._table[:, _START] = starts

    def _knows_inexact(self, number: int, tensor: TensorPlan) -> bool:
        """Whether it is known where adding an expert's delta does not make that expert."""
        if number not in self._inexact:
            readers = [(one, tensor.sources[name]) for one, name in zip(self._experts, self._names, strict=True)]
            found = self._inexact[number] = inexact_places(self._base, tensor.name, readers, tensor.info.numel)
            if found is not None:
                pieces = np.flatnonzero(self._tensors == number)
                ends = found.places.searchsorted(self._table[pieces, _START] + self._table[pieces, _COUNT])
                firsts = np.concatenate([[0], ends[:-1]])
                self._table[pieces, _INEXACT] = found.places.ctypes.data // 8 + firsts
                self._table[pieces, _INEXACT + 1] = ends - firsts
                self._table[pieces, _INEXACT + 2] = found.values.ctypes.data // 4 + firsts * len(self._experts)
        return self._inexact[number] is not None

    def _row(self, plan: Plan, tensor: TensorPlan, sink: LiveSink) -> list[int] | None:
        """What the kernel has to know of a tensor, whatever the candidate; None if it does not cover it."""
        place, tag = sink.place(tensor.name), sink.dtype(tensor.name, tensor.dtype)
        if place is None or len(tensor.sources) != len(self._names) or not tensor.info.numel:
            return None
        headers = [(one.checkpoint.tensors, tensor.sources[one.name]) for one in plan.experts]
        tags = [tensor.info.dtype, *(tensors[name].dtype for tensors, name in headers), tag]
        stochastic = plan.recipe.output.rounding == "stochastic" and tag != "F32"
        if any(one not in KINDS for one in tags) or place[0] not in ("F32", tag) or (stochastic and tag != "BF16"):
            return None
        own, theirs, kind, target = KINDS[tags[0]], KINDS[tags[1]], KINDS[tag], KINDS[place[0]]
        addresses = self._base.address(tensor.name), self._experts[0].address(headers[0][1]), place[1]
        firsts = [one // WIDTHS[kind] for one, kind in zip(addresses, (own, theirs, target), strict=True)]
        return [own, theirs, kind, target, *firsts, tensor.info.numel, 0, 0, 0, 0, 0, int(stochastic), 0, 0, 0, 0]

    def run(
        self, plan: Plan, tensors: Sequence[TensorPlan], known: Thresholds, merged: MergedDeltasOfPlan
    ) -> frozenset[str]:
        """Make what can be made here; the names of what was.

        Args:
            plan: what is to be done.
            tensors: those of its tensors that are blended.
            known: thresholds of these inputs that were found before; those that are read off are added.
            merged: merged deltas that were found before.
        """
        weights, of_plan = {one.name: one.weight for one in plan.experts}, Pools(plan)
        programs: dict[int, tuple[float | None, Trim | None, str]] = {}
        mine = np.zeros(len(self._numbers), bool)
        rates = np.zeros((len(mine), 2), np.float32)
        choices = np.zeros((len(mine), 4), np.int64)
        seed = plan.recipe.seed
        for tensor in tensors:
            number, pipeline = self._numbers.get(tensor.name), tensor.pipeline
            if number is None or pipeline is None:
                continue
            if id(pipeline) not in programs:
                programs[id(pipeline)] = *terms(program_of(pipeline, weights)), pipeline.prefix(0)
            weight, step, prefix = programs[id(pipeline)]
            rates[number] = 1.0 if weight is None else weight, tensor.lambda_
            if weight is None:
                held = merged.get(tensor)
                mine[number] = held is not None and self._knows_inexact(number, tensor)
                if held is not None:
                    choices[number, 0] = held.values.ctypes.data // held.values.itemsize
            elif step is None:
                mine[number] = True
            else:
                found = self._orders.threshold(of_plan, prefix, tensor, step, known)
                mine[number] = found is not None
                if found is not None:
                    floor, least = edge(found)
                    key = stream_key(seed, step.purpose, self._names[0], tensor.key) if least else 0
                    choices[number, 1:] = floor, _signed(least), _signed(key)
        self._make(mine, rates, choices, seed)
        return frozenset(name for name, number in self._numbers.items() if mine[number])

    def _make(self, mine: NDArray[np.bool_], rates: NDArray[np.float32], choices: NDArray[np.int64], seed: int) -> None:
        """Let all workers walk along the table of these tensors; those with values that are not finite are left out."""
        pieces = np.flatnonzero(mine[self._tensors])
        owners = self._tensors[pieces]
        table = self._table[pieces]
        table[:, _CHOICE] = choices[owners]
        table[:, _GIVEN] += np.where(table[:, _GIVEN], table[:, _START], 0)  # it goes on where its tensor does
        if table[:, _STOCHASTIC].any():
            table[:, _ROUND] = self._keys_of(seed)[owners]
        scales, status = rates[owners], np.zeros(len(pieces), np.int64)
        done = np.cumsum(table[:, _COUNT])
        shares = _SHARES * cores()
        total = int(done[-1]) if len(done) else 0
        ends = [0, *done.searchsorted(total * np.arange(1, shares + 1) // shares, side="right").tolist()]
        turn = count()

        def walk() -> None:
            scratch = np.empty(4 * STRIP + 2 * PIECE, np.uint32)
            while (share := next(turn)) < shares:
                self._native.multi_tensor(
                    0, 0, table.ctypes.data, scales.ctypes.data, len(self._experts), ends[share], ends[share + 1],
                    PIECE, status.ctypes.data, scratch.ctypes.data,
                )  # fmt: skip

        with Workers(cores(), "blend") as pool:
            others = [pool.submit(walk) for _ in range(cores() - 1)]
            walk()
            for other in others:
                other.result()
        mine[owners[status != FINE]] = False  # the general way finds the same and says where

    def _keys_of(self, seed: int) -> NDArray[np.int64]:
        """Of the random words by which tensors are rounded."""
        if self._round_keys is None or self._round_keys[0] != seed:
            keys = [_signed(stream_key(seed, "round", "", key)) for key in self._keys]
            self._round_keys = seed, np.array(keys, np.int64)
        return self._round_keys[1]


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def terms(program: Program | None) -> tuple[float | None, Trim | None]:
    """What one expert's delta is scaled by before lambda, and how it is trimmed; no scale if there is more to it."""
    if program is None or program.after is not None or len(program.steps) > 1:
        return None, None
    combine, step = program.combine, program.steps[0] if program.steps else None
    if not isinstance(step, Trim | None) or (step is not None and step.outliers):
        return None, None
    if isinstance(combine, Sum) and len(combine.weights) == 1:
        return combine.weights[0], step
    if isinstance(combine, Elect) and [*combine.votes, *combine.weights, *combine.shares] == [1, 1, 1]:
        return 1.0, step  # it agrees with itself
    return None, None
