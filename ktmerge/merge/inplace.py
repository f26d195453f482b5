"""The compiled way from memory to memory: base and experts are held there, a loaded model's parameters are written.

What does not depend on the numbers of a recipe is prepared once (see `ktmerge.merge.pristine`); what is left for a
candidate of a sweep is to decide about every tensor, and one pass over them all. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.device import cores
from ktmerge.merge.fused import Fused, pools
from ktmerge.merge.kernels.codes import BLOCK, F32, FINE
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.kernels.native import Native
from ktmerge.merge.multi_tensor import terms
from ktmerge.merge.pristine import HostReader
from ktmerge.merge.program import Budget, Cap, Given, Measured, Program, Ruled, Trim
from ktmerge.merge.report import TensorReport
from ktmerge.merge.workspace import KINDS, WIDTHS, Combine, spelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.merged import MergedDelta, MergedDeltasOfPlan
    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.selection import Job, Thresholds
    from ktmerge.merge.sinks import LiveSink
    from ktmerge.merge.source import Sources
    from ktmerge.merge.workspace import Workspace

PIECE = 1 << 19
"""Elements of a piece; a multiple of 8, as random draws come in eights."""
_BATCH = 1 << 28
"""Elements after which progress can be told."""
_GIVEN = Program((), Given())
_NOTHING = Given(), 1.0
Settled = tuple[Combine | Ruled, float]
"""How deltas are combined, and a factor on that."""


@dataclass(frozen=True)
class _Piece:
    """Elements from ``start`` on of one tensor: all that its first piece is told, and where it differs."""

    tensor: int
    start: int
    size: int


class InPlace(Fused):
    """The way of one plan into one model, of inputs that are held in memory; ``merged`` were found before."""

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
        self._size = PIECE if chunk is None else max(8, chunk // 8 * 8)
        self._given = self._found()
        self._rates: dict[int, tuple[Combine, tuple[int, int, NDArray[np.float32], float]]] = {}
        self._arguments = self._no_steps.arguments(0)

    def run(self, tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, TensorReport | None]]:
        batch: list[Job] = []
        elements = 0
        elsewhere: list[TensorPlan] = []
        for tensor in tensors:
            job = self._jobs[tensor.name]
            if not self._is_here(tensor, job.kind) or (_is_measured(job.program) and not self._merged.fits):
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

    def _found(self) -> dict[str, MergedDelta]:
        """The merged deltas that are there; of tensors that share what their stages have to know, all or none."""
        found = {}
        for tensor in self._plan.tensors:
            held = self._merged.get(tensor)
            kind = KINDS.get(self._model.dtype(tensor.name, tensor.dtype), -1)
            if held is not None and self._is_here(tensor, kind):
                found[tensor.name] = held
        for members in reversed(list(pools(self._plan.tensors).values())):
            if any(tensor.name not in found for tensor in members):
                for tensor in members:
                    found.pop(tensor.name, None)
        return found

    def _program(self, tensor: TensorPlan) -> Program | None:
        return _GIVEN if tensor.name in self._given else super()._program(tensor)

    def _settle_pool(self, jobs: Sequence[Job], position: int, prefix: str) -> bool:
        return jobs[0].program is _GIVEN or super()._settle_pool(jobs, position, prefix)

    def _together(self, jobs: Sequence[Job]) -> Iterator[tuple[TensorPlan, TensorReport | None]]:
        """Make tensors, all of them by all workers."""
        settled = self._ruled(jobs, self._settle_all(jobs))
        left = self._to_leave([job for job, one in zip(jobs, settled, strict=True) if one is not None])
        pieces = [
            _Piece(number, start, min(self._size, job.elements - start))
            for number, job in enumerate(jobs)
            if settled[number] is not None
            for start in range(0, job.elements, self._size)
        ]
        experts = len(self._plan.experts)
        sums, kept = np.zeros((len(pieces), 4)), np.zeros((len(pieces), experts), np.int64)
        status = np.zeros(len(pieces), np.int64)
        held = [
            self._held_arguments(job, *(one or _NOTHING), left.get(job.tensor.name))
            for job, one in zip(jobs, settled, strict=True)
        ]
        kinds = np.array([[row.kind for row in job.rows] for job in jobs], np.int64).reshape(-1, experts + 1)
        firsts = np.array([self._firsts(job) for job in jobs], np.int64).reshape(-1, experts + 2)
        numbers = np.array([piece.tensor for piece in pieces], np.int64)
        places = firsts[numbers] + np.array([piece.start for piece in pieces], np.int64)[:, None]
        calls = [
            (
                0, 0, kinds.ctypes.data + piece.tensor * kinds.strides[0], address, experts, piece.size, piece.start,
                *held[piece.tensor].before, held[piece.tensor].out + piece.start,
                held[piece.tensor].leave and held[piece.tensor].leave + piece.start, sum_, kept_,
            )
            for piece, address, sum_, kept_ in zip(
                pieces, _rows(places), _rows(sums), _rows(kept), strict=True
            )
        ]  # fmt: skip
        turn = count()
        workers = [self._pool.submit(self._work, turn, calls, status) for _ in range(min(cores(), len(calls)))]
        for worker in workers:
            worker.result()
        for tensor, result in self._results(jobs, settled, numbers, status, sums, kept):
            if result is not None and (made := left.get(tensor.name)) is not None:
                made.kept, made.filled = result.kept, made.values.size
            yield tensor, result

    def _work(self, turn: Iterator[int], calls: Sequence[tuple[Any, ...]], status: NDArray[np.int64]) -> None:
        """One worker's share: the next piece that nobody has begun, until there is none."""
        scratch = np.empty((2 * len(self._plan.experts) + 7) * BLOCK, np.uint32)
        address, direct = scratch.ctypes.data, self._native.direct
        while (number := next(turn)) < len(calls):
            status[number] = direct(*calls[number], address)

    def _settle_all(self, jobs: Sequence[Job]) -> list[Settled | None]:
        """How each is combined and what a cap leaves of it; None for one that is not finite. Finds thresholds too."""
        found: list[Any] = []
        for job in jobs:
            looks = _is_measured(job.program) or isinstance(job.program.after, Cap)
            looks = looks or any(isinstance(step, Trim) and step.scope == "tensor" for step in job.program.steps)
            if not looks or self._is_shared(job):
                found.append(self._settle(job, self._spread, self._own))
            else:
                found.append(self._pool.submit(self._settle_alone, job))
        return [one.result() if isinstance(one, Future) else one for one in found]

    def _settle_alone(self, job: Job) -> Settled | None:
        with self._space() as space:
            return self._settle(job, self._alone(space), space.probe)

    def _ruled(self, jobs: Sequence[Job], settled: Sequence[Settled | None]) -> list[Settled | None]:
        """The same once the merged deltas that follow a rule are made: they are given then."""
        rules = {
            job.tensor.name: one
            for job, one in zip(jobs, settled, strict=True)
            if one is not None and isinstance(one[0], Ruled)
        }
        mine = [job for job in jobs if job.tensor.name in rules]
        for job in mine:
            made = self._merged.begin(job.tensor)
            assert made is not None  # `run` lets none through that do not fit
            self._given[job.tensor.name] = made
        counts = {name: np.zeros(len(self._plan.experts), np.int64) for name in rules}
        broken = set()
        for name, kept in self._spread(mine, partial(self._rule, rules)):
            counts[name] += 0 if kept is None else kept
            broken |= {name} if kept is None else set()
        for job in mine:
            held, own = self._given[job.tensor.name], counts[job.tensor.name].tolist()
            held.kept = dict(zip(job.tensor.sources, own, strict=True)) if job.program.steps else {}
            held.filled = 0 if job.tensor.name in broken else held.values.size
        return [
            one if job.tensor.name not in rules else None if job.tensor.name in broken else (Given(), 1.0)
            for job, one in zip(jobs, settled, strict=True)
        ]

    def _rule(self, rules: Mapping[str, Settled], space: Workspace, job: Job) -> tuple[str, NDArray[np.int64] | None]:
        """Merge what is held by a rule, up to lambda; how much of each delta is left before, None if not finite."""
        rule, factor = rules[job.tensor.name]
        assert isinstance(rule, Ruled)
        values, kept = self._given[job.tensor.name].values, np.zeros(len(self._plan.experts), np.int64)
        begin, limit = 0, job.program.limit
        for part in space.parts(job.steps, kept):
            own = values[space.start + begin :][: part.shape[1]]
            np.multiply(space.ruled(rule, part, begin), np.float32(factor), out=own)
            if limit < math.inf:
                own.clip(-np.float32(limit), np.float32(limit), out=own)
            begin += part.shape[1]
        return job.tensor.name, kept if space.is_finite else None

    def _to_leave(self, jobs: Iterable[Job]) -> dict[str, MergedDelta]:
        """Room for merged deltas that a next candidate is likely to ask for."""
        found = {}
        for job in jobs:
            if job.tensor.name not in self._given and (
                _is_measured(job.program) or (terms(job.program)[0] is None and self._merged.is_wanted(job.tensor))
            ):
                found[job.tensor.name] = self._merged.begin(job.tensor)
        return {name: made for name, made in found.items() if made is not None}

    def _held_arguments(
        self, job: Job, combine: Combine | Ruled, factor: float, leave: MergedDelta | None
    ) -> _Arguments:
        tensor = job.tensor
        assert not isinstance(combine, Ruled)  # `_ruled` leaves none
        if id(combine) not in self._rates:
            self._rates[id(combine)] = combine, spelled(combine)
        code, counted, rates, fallback = self._rates[id(combine)][1]
        given = tensor.name in self._given
        ends = np.array([fallback, factor, math.inf if given else job.program.limit, tensor.lambda_], np.float32)
        key = stream_key(self._plan.recipe.seed, "round", "", tensor.key) if job.stochastic else 0
        steps = job.steps.arguments(len(job.steps)) if job.program.steps and not given else self._arguments
        tag, address = self._model.place(tensor.name) or ("", 0)
        target = KINDS[tag]
        before = (
            *steps, code, counted, rates.ctypes.data, ends.ctypes.data, job.kind, int(job.stochastic), key, target
        )  # fmt: skip
        place = 0 if leave is None else leave.values.ctypes.data // leave.values.itemsize
        return _Arguments(before, address // WIDTHS[target], place, (rates, ends, job.steps))

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
        settled: Sequence[Settled | None],
        numbers: NDArray[np.int64],
        status: NDArray[np.int64],
        sums: NDArray[np.float64],
        kept: NDArray[np.int64],
    ) -> Iterator[tuple[TensorPlan, TensorReport | None]]:
        for number, (job, one) in enumerate(zip(jobs, settled, strict=True)):
            tensor = job.tensor
            first, last = np.searchsorted(numbers, [number, number + 1])
            if one is None or (status[first:last] != FINE).any():
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
    leave: int
    held: tuple[Any, ...]


def _is_measured(program: Program) -> bool:
    """Whether it takes a look at whole tensors that is not kept: its merged delta is."""
    return isinstance(program.combine, Measured | Ruled) or isinstance(program.after, Budget)


def _rows(array: NDArray[Any]) -> Iterable[int]:
    """Addresses of the rows of a matrix."""
    first, step = array.ctypes.data, array.strides[0]
    return range(first, first + step * len(array), step) if len(array) else ()
