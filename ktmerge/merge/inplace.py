"""The compiled way from memory to memory: base and experts are held there, a loaded model's parameters are written.

What does not depend on the numbers of a recipe is prepared once (see `ktmerge.merge.pristine`); what is left for a
candidate of a sweep is to decide about every tensor, and one pass over them all. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.device import cores
from ktmerge.merge.fused import Fused
from ktmerge.merge.kernels.codes import BLOCK, F32, FINE
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.kernels.native import Native
from ktmerge.merge.pristine import HostReader
from ktmerge.merge.program import Budget, Cap, Clamp, Given, Measured, Program, Ruled, Trim
from ktmerge.merge.report import TensorReport
from ktmerge.merge.workspace import KINDS, WIDTHS, Combine, spelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.merged import MergedDelta, MergedDeltasOfPlan
    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.selection import Job, Thresholds
    from ktmerge.merge.sinks import LiveSink
    from ktmerge.merge.source import Sources

PIECE = 1 << 19
"""Elements of a piece; a multiple of 4, as random words come in fours."""
_BATCH = 1 << 28
"""Elements after which progress can be told."""


@dataclass(frozen=True)
class _Piece:
    """Elements from ``start`` on of one tensor: all that its first piece is told, and where it differs."""

    tensor: int
    start: int
    size: int


class InPlace(Fused):
    """The way of one plan into one model.

    Args:
        plan: what is to be done.
        sources: base and experts, held in this process's memory.
        sink: the model.
        native: the compiled kernels.
        chunk: elements of a piece; None for what suits the machine.
        known: thresholds of these inputs that were found before; those found now are added.
        merged: merged deltas that were found before.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        sink: LiveSink,
        native: Native,
        chunk: int | None,
        known: Thresholds,
        merged: MergedDeltasOfPlan,
    ) -> None:
        super().__init__(plan, sources, sink, native, chunk, known)
        self._native, self._model, self._merged = native, sink, merged
        self._size = PIECE if chunk is None else max(4, chunk // 4 * 4)
        self._given: dict[str, MergedDelta] = {}
        self._rates: dict[int, tuple[int, int, NDArray[np.float32], float]] = {}
        self._arguments = self._no_steps.arguments(0)

    def run(self, tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, TensorReport | None]]:
        batch: list[Job] = []
        elements = 0
        elsewhere: list[TensorPlan] = []
        for tensor in tensors:
            job = self._jobs[tensor.name]
            if not self._is_here(tensor, job.kind):
                elsewhere.append(tensor)
                continue
            batch.append(job)
            elements += job.elements
            if elements >= _BATCH:
                yield from self._together(batch)
                batch, elements = [], 0
        yield from self._together(batch)
        yield from super().run(elsewhere)

    def _is_here(self, tensor: TensorPlan, kind: int) -> bool:
        """Whether the model has the tensor in memory, in the type that is rounded to or in fp32."""
        place = self._model.place(tensor.name)
        return place is not None and KINDS.get(place[0]) in (kind, F32)

    def _program(self, tensor: TensorPlan) -> Program | None:
        found = super()._program(tensor)
        looks = found is not None and (isinstance(found.combine, Measured | Ruled) or isinstance(found.after, Budget))
        if not looks and found is not None:
            return found  # what takes a look at whole tensors first is kept once it is merged
        held = self._merged.get(tensor)
        if held is None or not self._is_here(tensor, KINDS[self._model.dtype(tensor.name, tensor.dtype)]):
            return None
        self._given[tensor.name] = held
        return Program((), Given())

    def _together(self, jobs: Sequence[Job]) -> Iterator[tuple[TensorPlan, TensorReport | None]]:
        """Make tensors, all of them by all workers."""
        factors = self._settle_all(jobs)
        pieces = [
            _Piece(number, start, min(self._size, job.elements - start))
            for number, job in enumerate(jobs)
            if factors[number] is not None
            for start in range(0, job.elements, self._size)
        ]
        experts = len(self._plan.experts)
        sums, kept = np.zeros((len(pieces), 4)), np.zeros((len(pieces), experts), np.int64)
        status = np.zeros(len(pieces), np.int64)
        held = [self._held_arguments(job, factor) for job, factor in zip(jobs, factors, strict=True)]
        kinds = np.array([[row.kind for row in job.rows] for job in jobs], np.int64).reshape(-1, experts + 1)
        firsts = np.array([self._firsts(job) for job in jobs], np.int64).reshape(-1, experts + 2)
        numbers = np.array([piece.tensor for piece in pieces], np.int64)
        places = firsts[numbers] + np.array([piece.start for piece in pieces], np.int64)[:, None]
        calls = [
            (
                0, 0, kinds.ctypes.data + piece.tensor * kinds.strides[0], address, experts, piece.size, piece.start,
                *held[piece.tensor].before, held[piece.tensor].out + piece.start, sum_, kept_,
            )
            for piece, address, sum_, kept_ in zip(
                pieces, _rows(places), _rows(sums), _rows(kept), strict=True
            )
        ]  # fmt: skip
        turn = count()
        workers = [self._pool.submit(self._work, turn, calls, status) for _ in range(min(cores(), len(calls)))]
        for worker in workers:
            worker.result()
        yield from self._results(jobs, factors, numbers, status, sums, kept)

    def _work(self, turn: Iterator[int], calls: Sequence[tuple[Any, ...]], status: NDArray[np.int64]) -> None:
        """One worker's share: the next piece that nobody has begun, until there is none."""
        scratch = np.empty((2 * len(self._plan.experts) + 8) * BLOCK, np.uint32)
        address, direct = scratch.ctypes.data, self._native.direct
        while (number := next(turn)) < len(calls):
            status[number] = direct(*calls[number], address)

    def _settle_all(self, jobs: Sequence[Job]) -> list[float | None]:
        """What a cap leaves of each; None for a tensor that is not finite. Thresholds are found as well."""
        found: list[Any] = []
        for job in jobs:
            looks = isinstance(job.program.after, Cap) or any(
                isinstance(step, Trim) and step.scope == "tensor" for step in job.program.steps
            )
            if not looks or self._is_shared(job):
                found.append(self._settle(job, self._spread, self._own))
            else:
                found.append(self._pool.submit(self._settle_alone, job))
        settled = [one.result() if isinstance(one, Future) else one for one in found]
        return [None if one is None else one[1] for one in settled]

    def _settle_alone(self, job: Job) -> tuple[Combine | Ruled, float] | None:
        space = self._spaces.get()
        try:
            return self._settle(job, self._alone(space), space.probe)
        finally:
            self._spaces.put(space)

    def _held_arguments(self, job: Job, factor: float | None) -> _Arguments:
        tensor, program = job.tensor, job.program
        assert not isinstance(program.combine, Measured | Ruled)  # `_program` lets none through
        if id(program) not in self._rates:
            self._rates[id(program)] = spelled(program.combine)
        code, counted, rates, fallback = self._rates[id(program)]
        limit = program.after.limit if isinstance(program.after, Clamp) else math.inf
        ends = np.array([fallback, 1.0 if factor is None else factor, limit, tensor.lambda_], np.float32)
        key = stream_key(self._plan.recipe.seed, "round", "", tensor.key) if job.stochastic else 0
        steps = job.steps.arguments(len(job.steps)) if program.steps else self._arguments
        tag, address = self._model.place(tensor.name) or ("", 0)
        target = KINDS[tag]
        before = (
            *steps, code, counted, rates.ctypes.data, ends.ctypes.data, job.kind, int(job.stochastic), key, target
        )  # fmt: skip
        return _Arguments(before, address // WIDTHS[target], (rates, ends, job.steps))

    def _firsts(self, job: Job) -> list[int]:
        """First elements of all rows, and of the merged delta if it is given, as the kernel counts them."""
        found = []
        for row in job.rows:
            assert isinstance(row.reader, HostReader)
            found.append(row.reader.address(row.name) // row.width)
        held = self._given.get(job.tensor.name)
        return [*found, 0 if held is None else held.values.ctypes.data // held.values.itemsize]

    def _results(
        self,
        jobs: Sequence[Job],
        factors: Sequence[float | None],
        numbers: NDArray[np.int64],
        status: NDArray[np.int64],
        sums: NDArray[np.float64],
        kept: NDArray[np.int64],
    ) -> Iterator[tuple[TensorPlan, TensorReport | None]]:
        for number, (job, factor) in enumerate(zip(jobs, factors, strict=True)):
            tensor = job.tensor
            first, last = np.searchsorted(numbers, [number, number + 1])
            if factor is None or (status[first:last] != FINE).any():
                yield tensor, None  # the general way finds the same and says where
                continue
            result = TensorReport(tensor.name, tensor.part, tensor.method, tensor.info.numel)
            result.intended, result.base, result.along, changed = sums[first:last].sum(axis=0).tolist()
            result.changed = int(changed)
            if tensor.name in self._given:
                result.kept = dict(self._given[tensor.name].kept)
            elif job.program.steps:
                result.kept = dict(zip(tensor.sources, kept[first:last].sum(axis=0).tolist(), strict=True))
            yield tensor, result


@dataclass(frozen=True)
class _Arguments:
    """The kernel's arguments that all pieces of a tensor share; ``held`` is what some of them are the addresses of."""

    before: tuple[Any, ...]
    out: int
    held: tuple[Any, ...]


def _rows(array: NDArray[Any]) -> Iterable[int]:
    """Addresses of the rows of a matrix."""
    first, step = array.ctypes.data, array.strides[0]
    return range(first, first + step * len(array), step) if len(array) else ()
