"""The fast way for element-wise pipelines on the CPU: compiled kernels over raw pieces, on all cores. Loads no torch.

Tensors are made piece by piece, a large one by all workers together, others by one worker each. Reading, arithmetic
and writing of different pieces overlap, as none of them holds the interpreter's lock. Whatever is not covered here
takes the general way, and every result equals that bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.checkpoints.workers import Workers
from ktmerge.merge.device import cores
from ktmerge.merge.kernels.codes import FINE
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.kernels.native import Native
from ktmerge.merge.program import Budget, Cap, Chosen, Measured, Program, Ramp, Ruled, Sum, Trim, program_of
from ktmerge.merge.reductions import answered, energies_of, squared_norms, weights_of
from ktmerge.merge.report import TensorReport
from ktmerge.merge.ruling import blend_ruled, informed
from ktmerge.merge.selection import Found, Job, Key, Recollected, Run, Thresholds, Work, find_thresholds
from ktmerge.merge.steps import Steps
from ktmerge.merge.workspace import KINDS, Blended, Combine, Row, Target, Workspace

if TYPE_CHECKING:
    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.sinks import Sink
    from ktmerge.merge.source import Sources
    from ktmerge.progress import Progress

    Made = list[tuple[TensorPlan, TensorReport | None]]

PIECE = 1 << 21
"""Most elements of a piece; a multiple of 8, as random draws come in eights."""
HELD = 128 << 20
"""Bytes of all workers' buffers together, at most."""
_LARGE = 4
"""Pieces above which a tensor is shared among workers."""
_BATCH = 128
"""Tensors that a worker is given at a time, at most."""
_PROBE = 2048
"""Elements compared before a whole tensor is."""


class Fused:
    """The fast way over one plan; a context manager that holds threads.

    Args:
        plan: what is to be done.
        sources: the open inputs.
        sink: where tensors go.
        native: the compiled kernels.
        chunk: elements of a piece; None for what suits the machine.
        known: thresholds of these inputs that were found before; those found now are added.
        recollected: the same, and samples, from other processes: held against the blend before they are trusted.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        sink: Sink,
        native: Native,
        chunk: int | None = None,
        known: Thresholds | None = None,
        recollected: Recollected | None = None,
    ) -> None:
        self._plan = plan
        self._sources = sources
        self._sink = sink
        workers = cores()
        experts = len(plan.experts)
        room = HELD // workers // (4 * (experts + 2))  # for base, experts and result, should they be fp32
        self._piece = max(8, (chunk or min(PIECE, room)) // 8 * 8)
        self._ahead = 4 * workers
        self._pool = Workers(workers, "blend")
        self._spaces: SimpleQueue[Workspace] = SimpleQueue()
        for _ in range(workers):
            self._spaces.put(Workspace(native, experts))
        self._own = Workspace(native, experts)
        self._jobs: dict[str, Job] = {}
        self._known = {} if known is None else known
        self._recollected = Recollected() if recollected is None else recollected
        self._headers = {expert.name: expert.checkpoint.tensors for expert in plan.experts}
        self._weights = {expert.name: expert.weight for expert in plan.experts}
        self._programs: dict[int, Program | None] = {}
        self._combines: dict[str, Combine | Ruled] = {}
        self._no_steps = Steps((), list(self._weights), plan.recipe.seed, "")

    def __enter__(self) -> Fused:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for work under way, drop what has not begun, and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    def prepare(self, tensors: Sequence[TensorPlan], progress: Progress) -> frozenset[str]:
        """Find out which tensors can go this way, and the thresholds that several of them share.

        Args:
            tensors: all of the plan.
            progress: where to report.

        Returns:
            their names; of tensors that share a threshold all or none.
        """
        for tensor in tensors:
            job = self._job(tensor)
            if job is not None:
                self._jobs[tensor.name] = job
        for (position, prefix), members in pools(tensors).items():
            jobs = [self._jobs[tensor.name] for tensor in members if tensor.name in self._jobs]
            found = False
            if len(jobs) == len(members):
                with progress.task("measure", len(jobs), "items") as step:
                    found = self._settle_pool(jobs, position, prefix)
                    step.advance(len(jobs))
            if not found:
                for tensor in members:
                    self._jobs.pop(tensor.name, None)
        return frozenset(self._jobs)

    def _settle_pool(self, jobs: Sequence[Job], position: int, prefix: str) -> bool:
        """Find out what the stage at ``position`` has to know of all these tensors; whether that is possible."""
        counted = [job for job in jobs if not job.tensor.is_alias]
        if position == len(jobs[0].steps):
            combine = self._measured(jobs[0].program.combine, counted, self._spread)
            if combine is not None:
                self._combines |= {job.tensor.name: combine for job in jobs}
            return combine is not None
        names = tuple(job.tensor.name for job in counted)
        found = self._thresholds((prefix, names), counted, position, self._spread, self._own)
        if found is not None:
            for job in jobs:
                job.steps.set_thresholds(position, found)
        return found is not None

    def run(self, tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, TensorReport | None]]:
        """Make the tensors and hand them to the sink; None where an input is not finite or a value overflows."""
        running: deque[Future[Made]] = deque()
        for batch in self._batches([self._jobs[tensor.name] for tensor in tensors]):
            if self._is_shared(batch[0]):
                yield batch[0].tensor, self._make(batch[0], self._spread, self._own)
                continue
            running.append(self._pool.submit(self._make_alone, batch))
            while len(running) > self._ahead:
                yield from running.popleft().result()
        for future in running:
            yield from future.result()

    def _batches(self, jobs: Iterable[Job]) -> Iterator[list[Job]]:
        """Small tensors by the hundred: to hand each to a worker alone would cost more than to make it."""
        batch: list[Job] = []
        elements = 0
        for job in jobs:
            if batch and (len(batch) == _BATCH or elements + job.elements > self._piece // 4):
                yield batch
                batch, elements = [], 0
            batch.append(job)
            elements += job.elements
        if batch:
            yield batch

    def _job(self, tensor: TensorPlan) -> Job | None:
        """What the kernels need to make a tensor; None if they cannot."""
        if len(tensor.sources) != len(self._plan.experts):
            return None
        tag = self._sink.dtype(tensor.name, tensor.dtype)
        tags = [tensor.info.dtype, *(self._headers[name][source].dtype for name, source in tensor.sources.items())]
        stochastic = self._plan.recipe.output.rounding == "stochastic" and tag != "F32"
        if not {tag, *tags} <= KINDS.keys() or (stochastic and tag != "BF16") or not tensor.info.numel:
            return None
        program = self._program(tensor)
        if program is None:
            return None
        readers = [self._sources.base, *(self._sources.experts[name] for name in tensor.sources)]
        names = [tensor.name, *tensor.sources.values()]
        rows = [Row(reader, name, KINDS[own]) for reader, name, own in zip(readers, names, tags, strict=True)]
        seed = self._plan.recipe.seed
        chosen = [
            one.drop(seed, tensor.key, tensor.layout) if isinstance(one, Chosen) else one for one in program.steps
        ]
        taken = [one for one in chosen if one is not None]
        if len(taken) < len(chosen):
            return None
        program = replace(program, steps=tuple(taken)) if taken else program
        steps = Steps(taken, list(tensor.sources), seed, tensor.key) if taken else self._no_steps
        return Job(tensor, rows, steps, program, KINDS[tag], stochastic)

    def _program(self, tensor: TensorPlan) -> Program | None:
        """What the kernels are to do, if they can; tensors share pipelines."""
        pipeline = tensor.pipeline
        if pipeline is None:
            return None
        if id(pipeline) not in self._programs:
            self._programs[id(pipeline)] = program_of(pipeline, self._weights)
        return self._programs[id(pipeline)]

    def _is_shared(self, job: Job) -> bool:
        """Whether all workers are to be at a tensor together."""
        return job.elements > _LARGE * self._piece

    def _make_alone(self, jobs: Sequence[Job]) -> Made:
        """Make some tensors in one worker."""
        with self._space() as space:
            return [(job.tensor, self._make(job, self._alone(space), space.probe)) for job in jobs]

    @contextmanager
    def _space(self) -> Iterator[Workspace]:
        """Buffers that nobody else uses meanwhile."""
        space = self._spaces.get()
        try:
            yield space
        finally:
            self._spaces.put(space)

    def _alone(self, space: Workspace) -> Run:
        """Every piece one after the other."""

        def run(jobs: Iterable[Job], work: Work) -> Iterator[Any]:
            for one in jobs:
                for start in range(0, one.elements, self._piece):
                    space.hold(one.rows, start, min(start + self._piece, one.elements))
                    yield work(space, one)

        return run

    def _spread(self, jobs: Iterable[Job], work: Work) -> Iterator[Any]:
        """``work`` on every piece of every job, on all cores; results in order."""

        def piece(job: Job, start: int) -> Any:
            with self._space() as space:
                space.hold(job.rows, start, min(start + self._piece, job.elements))
                return work(space, job)

        pieces = (partial(piece, job, start) for job in jobs for start in range(0, job.elements, self._piece))
        return self._pool.in_order(pieces, self._ahead)

    def _make(self, job: Job, run: Run, probe: Workspace) -> TensorReport | None:
        tensor = job.tensor
        result = TensorReport(tensor.name, tensor.part, tensor.method, tensor.info.numel)
        if self._take_base(job, run, probe, result):
            return result
        totals, kept = np.zeros(4), np.zeros(len(job.rows) - 1, np.int64)
        settled = self._settle(job, run, probe)
        if settled is None:
            return None
        combine, factor = settled
        for piece in run([job], partial(self._blend, combine=combine, factor=factor)):
            if piece is None:
                return None
            totals += piece.sums
            kept += piece.kept
        if not self._is_kept(job, kept.tolist()):
            return self._make(job, run, probe)
        result.intended, result.base, result.along = (float(total) for total in totals[:3])
        result.changed = int(totals[3])
        if job.program.steps:
            result.kept = dict(zip(tensor.sources, kept.tolist(), strict=True))
        return result

    def _settle(self, job: Job, run: Run, probe: Workspace) -> tuple[Combine | Ruled, float] | None:
        """Find out what takes a look at the whole tensor: its thresholds, how it is combined, and a factor on that.

        None if an input is not finite.
        """
        for position, step in enumerate(job.program.steps):
            if isinstance(step, Trim) and step.scope == "tensor":
                found = self._thresholds((job.prefix(position), job.tensor.name), [job], position, run, probe)
                if found is None:
                    return None
                job.steps.set_thresholds(position, found)
        combine = self._combine(job, run)
        factor = None if combine is None else self._factor(job, run, combine)
        return None if combine is None or factor is None else (combine, factor)

    def _combine(self, job: Job, run: Run) -> Combine | Ruled | None:
        """How the deltas are combined, once they are measured; None if that cannot be."""
        if job.tensor.name in self._combines:
            return self._combines[job.tensor.name]
        combine = job.program.combine
        if isinstance(combine, Ruled) and combine.asks == "information":
            return informed(combine, self._sources.stored_fisher(job.tensor, with_base=combine.numbers[1] != 0))
        return self._measured(combine, [job], run)

    @staticmethod
    def _measured(combine: Combine | Measured | Ruled, jobs: Sequence[Job], run: Run) -> Combine | Ruled | None:
        """The same of some tensors together, or of one."""
        if isinstance(combine, Measured):
            weights = weights_of(combine, jobs, run)
            return None if weights is None else Sum(weights)
        if isinstance(combine, Ruled) and combine.asks != "nothing":
            return answered(combine, jobs, run)
        return combine

    def _thresholds(self, key: Key, jobs: Sequence[Job], position: int, run: Run, probe: Workspace) -> Found | None:
        tellable = _is_tellable(jobs, position)
        found = self._known.get(key) or (self._recollected.thresholds.get(key) if tellable else None)
        if found is None:
            found = find_thresholds(jobs, position, run, probe, self._recollected)
            if found is not None:
                self._known[key] = found
                if tellable:
                    self._recollected.add(key, found)
        return found

    def _is_kept(self, job: Job, kept: Sequence[int]) -> bool:
        """Whether so many elements are what a recalled threshold is for; if not, it is forgotten."""
        last = len(job.program.steps) - 1
        key = job.prefix(last), job.tensor.name
        found = self._recollected.thresholds.get(key)
        if found is None or key in self._known or not _is_tellable([job], last):
            return True
        pairs = zip((one for one, _ in found), kept, strict=True)
        fits = all(count == one.kept or (one.floor == 0 and count < one.kept) for one, count in pairs)
        if not fits:
            del self._recollected.thresholds[key]
        return fits

    def _factor(self, job: Job, run: Run, combine: Combine | Ruled) -> float | None:
        """What a ramp, a cap or a budget makes of the merged delta's length; None if an input is not finite."""
        after = job.program.after
        if isinstance(after, Ramp):
            return after.factor(job.tensor.part, self._plan.layers)
        if not isinstance(after, Cap | Budget) or isinstance(combine, Ruled):
            return 1.0
        norms = squared_norms(run([job], lambda space, one: space.squares(one.steps, combine)), 2)
        if norms is None:
            return None
        base, merged = norms
        if isinstance(after, Cap):
            return min(1.0, after.limit(base, merged))
        energies = energies_of([replace(job, steps=self._no_steps)], run)
        return None if energies is None else after.factor(energies, merged, list(self._weights.values()))

    def _blend(self, space: Workspace, job: Job, combine: Combine | Ruled, factor: float) -> Blended | None:
        tensor = job.tensor
        key = stream_key(self._plan.recipe.seed, "round", "", tensor.key)
        target = Target(job.kind, job.stochastic, key, tensor.lambda_, factor, job.program.limit)
        if isinstance(combine, Ruled):
            piece = blend_ruled(space, job.steps, combine, target)
        else:
            piece = space.blend(job.steps, combine, target)
        if piece.status != FINE:
            return None  # the general way finds the same and says where
        self._sink.write_bytes(tensor.name, piece.data, space.start * job.width)
        return piece

    def _take_base(self, job: Job, run: Run, probe: Workspace, result: TensorReport) -> bool:
        """Let the kernel copy the base's bytes if no expert changed any, as a frozen tower's; False if one did."""
        if any(row.kind != job.kind for row in job.rows):
            return False
        probe.hold(job.rows, 0, min(_PROBE, job.elements))
        if not probe.equal():
            return False
        total = 0.0
        for energy in run([job], lambda space, _: space.energy() if space.equal() else None):
            if energy is None:
                return False
            total += energy
        self._sink.copy(job.tensor.name, self._sources.base, job.tensor.name)
        result.base = total
        if job.program.steps:
            result.kept = dict.fromkeys(job.tensor.sources, 0)
        return True


def _is_tellable(jobs: Sequence[Job], position: int) -> bool:
    """Whether a blend counts what the trim at ``position`` keeps: one tensor's, no outliers, and nothing after it."""
    steps = jobs[0].program.steps
    step = steps[position] if steps else None
    return len(jobs) == 1 and position == len(steps) - 1 and isinstance(step, Trim) and not step.outliers


def pools(tensors: Iterable[TensorPlan]) -> dict[tuple[int, str], list[TensorPlan]]:
    """Tensors that share a threshold, by the position of its stage and all stages up to it."""
    found: dict[tuple[int, str], list[TensorPlan]] = {}
    keys: dict[int, list[tuple[int, str]]] = {}
    for tensor in tensors:
        pipeline = tensor.pipeline
        if pipeline is None:
            continue
        if id(pipeline) not in keys:
            last = len(pipeline.transforms)  # what works on the merged delta finds its statistics elsewhere
            keys[id(pipeline)] = [pool for pool in pipeline.pools() if pool[0] <= last]
        for key in keys[id(pipeline)]:
            found.setdefault(key, []).append(tensor)
    return dict(sorted(found.items()))
