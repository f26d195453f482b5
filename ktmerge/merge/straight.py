"""Candidates of a sweep with one expert: into the model in one call for all tensors, nothing measured. Loads no torch.

All that depends on the models alone is laid out once; of a candidate only its numbers are put into a table that the
kernel walks along. What is not covered here goes the other ways, and every result equals theirs bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ktmerge.checkpoints.workers import Workers
from ktmerge.merge.device import cores
from ktmerge.merge.kernels.codes import BF16, BLOCK, COLUMNS, F32, FINE
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.order import Orders, Pool
from ktmerge.merge.program import Elect, Program, Sum, Trim, program_of
from ktmerge.merge.steps import edge
from ktmerge.merge.workspace import KINDS, WIDTHS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.kernels.native import Native
    from ktmerge.merge.merged import MergedDelta, MergedDeltasOfPlan
    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.pristine import HostReader
    from ktmerge.merge.selection import Thresholds
    from ktmerge.merge.sinks import LiveSink

PIECE = 1 << 17
"""Elements of a piece; a multiple of a block."""
_SHARES = 8
"""Parts of the work a worker: one that is held up leaves some to the others."""
_DIRECT = (BF16, F32)
"""Kinds whose elements are fp32 patterns, or the upper halves of such."""


class Straight:
    """The way of all plans with the same base and expert into one model.

    Args:
        plan: one of them.
        base: held in this process's memory.
        expert: likewise.
        sink: the model.
        native: the compiled kernels.
    """

    def __init__(self, plan: Plan, base: HostReader, expert: HostReader, sink: LiveSink, native: Native) -> None:
        self._native, self._name, self._base, self._expert = native, plan.experts[0].name, base, expert
        self._orders = Orders(base, expert, self._name, native)
        headers = plan.experts[0].checkpoint.tensors
        stochastic = plan.recipe.output.rounding == "stochastic"
        self._numbers: dict[str, int] = {}
        columns: list[list[int]] = []
        for tensor in plan.tensors:
            place, source = sink.place(tensor.name), tensor.sources.get(self._name)
            tag = sink.dtype(tensor.name, tensor.dtype)
            if source is None or place is None or place[0] != "F32" or (stochastic and tag != "F32"):
                continue
            tags = (tensor.info.dtype, headers[source].dtype, tag)
            if not tensor.info.numel or any(KINDS.get(one) not in _DIRECT for one in tags):
                continue
            kinds = [KINDS[one] for one in tags]
            widths = [WIDTHS[kind] for kind in kinds]
            firsts = base.address(tensor.name) // widths[0], expert.address(source) // widths[1], place[1] // 4
            self._numbers[tensor.name] = len(columns)
            columns.append([*kinds, *firsts, tensor.info.numel, 0, 0, 0, 0, 0])
        laid = np.array(columns, np.int64).reshape(-1, COLUMNS)
        counts = -(-laid[:, 6] // PIECE)
        self._tensors = np.repeat(np.arange(len(laid)), counts)
        starts = PIECE * (np.arange(len(self._tensors)) - np.repeat(np.cumsum(counts) - counts, counts))
        self._table = np.ascontiguousarray(laid[self._tensors])
        self._table[:, 3:6] += starts[:, None]
        self._table[:, 6] = np.minimum(PIECE, self._table[:, 6] - starts)
        self._table[:, 7] = starts
        self._elements = int(laid[:, 6].sum())

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
        weights, pool = {self._name: plan.experts[0].weight}, Pool(plan)
        programs: dict[int, tuple[Program | None, str]] = {}
        mine = np.zeros(len(self._numbers), bool)
        rates = np.zeros((len(mine), 2), np.float32)
        numbers = np.zeros((len(mine), 4), np.int64)
        for tensor in tensors:
            number, pipeline = self._numbers.get(tensor.name), tensor.pipeline
            if number is None or pipeline is None:
                continue
            if id(pipeline) not in programs:
                programs[id(pipeline)] = program_of(pipeline, weights), pipeline.prefix(0)
            program, prefix = programs[id(pipeline)]
            weight, step = (None, None) if program is None else _terms(program)
            rates[number] = 1.0 if weight is None else weight, tensor.lambda_
            if weight is None:
                held = merged.get(tensor)
                mine[number] = held is not None
                if held is not None and not self._is_delta(tensor, held):
                    numbers[number, 0] = held.values.ctypes.data // held.values.itemsize
                continue
            if step is not None:
                found = self._orders.threshold(pool, prefix, tensor, step, known)
                if found is None:
                    continue
                floor, least = edge(found)
                key = stream_key(plan.recipe.seed, step.purpose, self._name, tensor.key) if least else 0
                numbers[number, 1:] = floor, _signed(least), _signed(key)
            mine[number] = True
        self._make(mine, rates, numbers)
        return frozenset(name for name, number in self._numbers.items() if mine[number])

    def _is_delta(self, tensor: TensorPlan, held: MergedDelta) -> bool:
        """Whether nothing was taken from an expert's delta: then that need not be read beside it."""
        if held.is_delta is None:
            base, expert = self._base.read(tensor.name), self._expert.read(tensor.sources[self._name])
            held.is_delta = bool(((expert.float() - base.float()).numpy() == held.values).all())
        return held.is_delta

    def _make(self, mine: NDArray[np.bool_], rates: NDArray[np.float32], numbers: NDArray[np.int64]) -> None:
        """Let all workers walk along the table of these tensors; those with values that are not finite are left out."""
        pieces = np.flatnonzero(mine[self._tensors])
        owners = self._tensors[pieces]
        table = self._table[pieces]
        table[:, 8:] = numbers[owners]
        table[:, 8] += np.where(table[:, 8], table[:, 7], 0)  # a merged delta goes on where its tensor does
        scales, status = rates[owners], np.zeros(len(pieces), np.int64)
        done = np.cumsum(table[:, 6])
        ends = done.searchsorted(np.linspace(0, self._elements, _SHARES * cores() + 1)[1:], side="right").tolist()

        def walk(first: int, last: int) -> None:
            scratch = np.empty(BLOCK, np.uint32)
            self._native.straight(
                0, 0, table.ctypes.data, scales.ctypes.data, first, last, status.ctypes.data, scratch.ctypes.data
            )

        with Workers(cores(), "blend") as pool:
            list(pool.map(walk, [0, *ends[:-1]], ends))
        mine[owners[status != FINE]] = False  # the general way finds the same and says where


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _terms(program: Program) -> tuple[float | None, Trim | None]:
    """What the expert's delta is scaled by before lambda, and how it is trimmed; no scale if there is more to it."""
    combine, step = program.combine, program.steps[0] if program.steps else None
    if (
        program.after is not None
        or len(program.steps) > 1
        or not isinstance(step, Trim | None)
        or (step is not None and step.outliers)
    ):
        return None, None
    if isinstance(combine, Sum):
        return combine.weights[0], step
    if isinstance(combine, Elect) and (combine.votes[0], combine.weights[0], combine.shares[0]) == (1, 1, 1):
        return 1.0, step  # it agrees with itself
    return None, None
