"""Plan to tensors: each is copied, made by the compiled kernels, or taken through its stages one by one.

Fixed memory, whatever the model's size. Loads torch only for what the compiled kernels do not cover.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from ktmerge.errors import KtmergeError
from ktmerge.merge.device import choose_device
from ktmerge.merge.fused import Fused
from ktmerge.merge.inplace import InPlace
from ktmerge.merge.kernels.native import is_compiled, native
from ktmerge.merge.plan import Plan, TensorPlan
from ktmerge.merge.pristine import Pristine
from ktmerge.merge.report import BlendReport, TensorReport, cautions
from ktmerge.merge.selection import Recollected
from ktmerge.merge.sinks import LiveSink, Sink
from ktmerge.merge.source import Sources, buffer_notes, equal_bytes
from ktmerge.progress import SILENT, Progress, Step

if TYPE_CHECKING:
    from ktmerge.merge.lanes import Lanes

_CONFIRMED_EVERY = 0.2
"""Seconds of work, or a little more, that a killed blend loses."""


def execute(
    plan: Plan,
    sink: Sink,
    device: str = "auto",
    progress: Progress = SILENT,
    *,
    chunk: int | None = None,
    pristine: Pristine | None = None,
    recollected: Recollected | None = None,
    measured: bool = True,
) -> BlendReport:
    """Carry out a plan.

    Args:
        plan: what becomes of every tensor.
        sink: where the tensors go; what it has finished already is not made again.
        device: auto, cpu or cuda; what a device would round otherwise is done on the CPU.
        progress: where to report.
        pristine: copies in memory to read instead of the files.
        chunk: elements worked on at a time; changes memory, never the result. None: what suits the machine.
        recollected: what was found of these inputs before; what is found now is added.
        measured: say in the report what became of every tensor; it costs time.

    Raises:
        UsageError: the device is not there, or a tied head differs from its embedding.
        KtmergeError: an input is not finite, cannot be read or was changed; a value overflows the output's type.
    """
    started = time.perf_counter()
    place = choose_device(device)
    report = BlendReport(plan.recipe.name, [], device=place, notes=list(plan.notes))
    with Sources(plan, chunk, pristine) as sources:
        _require_tied(plan, sources)
        report.notes += buffer_notes(plan, sources)
        engine = _Engine(plan, sink, sources, place, progress, pristine, recollected, measured)
        try:
            done = engine.run(chunk)
        except BaseException:
            with suppress(KtmergeError):
                engine.confirm()
            raise
        engine.confirm()
    report.tensors = [done[tensor.name] for tensor in plan.tensors] if measured else []
    report.notes += [*_broken_notes(done.values()), *cautions(report.tensors)]
    report.read = plan.base.nbytes + sum(expert.checkpoint.nbytes for expert in plan.experts)
    report.written = sum(tensor.nbytes for tensor in plan.tensors)
    report.seconds = time.perf_counter() - started
    return report


@dataclass
class _Engine:
    """One run over one plan; see `execute`."""

    plan: Plan
    sink: Sink
    sources: Sources
    device: str
    progress: Progress
    pristine: Pristine | None
    recollected: Recollected | None
    measured: bool

    def __post_init__(self) -> None:
        self._merged = None if self.pristine is None else self.pristine.merged(self.plan)
        self._done: dict[str, TensorReport] = {}
        self._unconfirmed: list[tuple[str, TensorReport]] = []
        self._next = 0.0
        self._running = ExitStack()

    def run(self, chunk: int | None) -> dict[str, TensorReport]:
        """Make every tensor; reports by name."""
        left = []
        for tensor in self.plan.tensors:
            earlier = self.sink.finished(tensor.name)
            if earlier is None:
                left.append(tensor)
            else:
                self._done[tensor.name] = TensorReport(**earlier)
        copied = [tensor for tensor in left if self._is_copy(tensor)]
        blended = [tensor for tensor in left if not self._is_copy(tensor)]
        made = frozenset() if self.measured else self._multi_tensor(blended)
        blended = [tensor for tensor in blended if tensor.name not in made]
        away = [tensor for tensor in blended if self._is_away(tensor)]
        blended = [tensor for tensor in blended if not self._is_away(tensor)]
        self._say_what_stays(blended)
        with self._fused(blended, chunk) as fused, self._lanes(away) as lanes, self._running:
            mine = fused.prepare(self.plan.tensors, self.progress) if fused is not None else frozenset()
            general = self._general([tensor for tensor in blended if tensor.name not in mine])
            on_device = self._general(away, lanes)
            total = sum(tensor.info.nbytes for tensor in self.plan.tensors)
            with self.progress.task("blend", total, "bytes") as step:
                done = made | self._done.keys()
                step.advance(sum(tensor.info.nbytes for tensor in self.plan.tensors if tensor.name in done))
                self._take(copied, step)
                refused: list[TensorPlan] = []
                if fused is not None:
                    for tensor, result in fused.run([tensor for tensor in blended if tensor.name in mine]):
                        if result is None:
                            refused.append(tensor)
                        else:
                            self._finish(tensor, result, step)
                for tensor, result in chain(on_device, general, self._general(refused)):
                    self._finish(tensor, result, step)
        return self._done

    def _is_copy(self, tensor: TensorPlan) -> bool:
        """Whether another's tensor is taken as it is."""
        if tensor.action == "blend":
            return False
        checkpoint = self.plan.base if tensor.expert is None else self.plan.expert(tensor.expert).checkpoint
        return checkpoint.tensors[self._source(tensor)].dtype == self.sink.dtype(tensor.name, tensor.dtype)

    def _is_away(self, tensor: TensorPlan) -> bool:
        """Whether it is made on a device."""
        return self.device != "cpu" and tensor.pipeline is not None and tensor.pipeline.portable

    def _say_what_stays(self, tensors: Iterable[TensorPlan]) -> None:
        """What was asked of a device and is done here."""
        found = [tensor.method for tensor in tensors if tensor.pipeline is not None]
        if found and self.device != "cpu" and self.measured:
            names = ", ".join(sorted(set(found)))
            self.progress.note(f"{len(found)} tensors are blended on the CPU: a GPU would round {names} otherwise")

    def _source(self, tensor: TensorPlan) -> str:
        """Its name where it is taken from."""
        return tensor.name if tensor.expert is None else tensor.sources[tensor.expert]

    def _take(self, tensors: Iterable[TensorPlan], step: Step) -> None:
        for tensor in tensors:
            self.sink.copy(tensor.name, self.sources.of(tensor.expert), self._source(tensor))
            result = TensorReport(tensor.name, tensor.part, tensor.method, tensor.info.numel)
            self._finish(tensor, result, step)

    def _multi_tensor(self, left: Sequence[TensorPlan]) -> frozenset[str]:
        """Make what takes one pass with nothing to find out or to report; the names."""
        pristine, merged, sink, kernels = self.pristine, self._merged, self.sink, native()
        if pristine is None or merged is None or not isinstance(sink, LiveSink) or self.device != "cpu" or not kernels:
            return frozenset()
        way = pristine.multi_tensor(self.plan, sink, kernels)
        return frozenset() if way is None else way.run(self.plan, left, pristine.thresholds(self.plan), merged)

    def _fused(self, left: Sequence[TensorPlan], chunk: int | None) -> AbstractContextManager[Fused | None]:
        """The compiled way, if there is one here and something for it to do."""
        if not any(tensor.pipeline for tensor in left):
            return nullcontext()
        if not is_compiled(*_groups(left)):
            self.progress.note("compiling the kernels for this processor, once; it takes about twenty seconds")
        kernels = native()
        if kernels is None:
            return nullcontext()
        if self.pristine is None or self._merged is None:
            return Fused(self.plan, self.sources, self.sink, kernels, chunk, recollected=self.recollected)
        known = self.pristine.thresholds(self.plan)
        if not isinstance(self.sink, LiveSink):
            return Fused(self.plan, self.sources, self.sink, kernels, chunk, known)
        return InPlace(self.plan, self.sources, self.sink, kernels, chunk, known, self._merged)

    def _lanes(self, away: Sequence[TensorPlan]) -> AbstractContextManager[Lanes | None]:
        """The ways to the device, if it has something to do."""
        if not away:
            return nullcontext()
        from ktmerge.merge.lanes import Cuda, Lanes

        return Lanes(Cuda(self.device))

    def _general(
        self, left: Sequence[TensorPlan], lanes: Lanes | None = None
    ) -> Iterable[tuple[TensorPlan, TensorReport]]:
        """Take tensors through their stages as torch functions."""
        if not left:
            return ()
        from ktmerge.merge.general import General

        general = General(self.plan, self.sink, self.sources, lanes, self._merged)
        general.prepare(left, self.progress)
        running = general.run(left)
        self._running.callback(running.close)  # whatever fails here, its threads end before what they work with
        return running

    def _finish(self, tensor: TensorPlan, result: TensorReport, step: Step) -> None:
        self._done[tensor.name] = result
        self._unconfirmed.append((tensor.name, result))
        if time.perf_counter() > self._next:
            self.confirm()
        step.advance(tensor.info.nbytes)

    def confirm(self) -> None:
        """Say which tensors are finished, if the inputs are still what they were when those were made of them.

        Raises:
            KtmergeError: they are not, and whoever goes on with this must not take them for finished.
        """
        started = time.perf_counter()
        self.sources.check_unchanged()
        for name, result in self._unconfirmed:
            self.sink.finish(name, result)
        self._unconfirmed.clear()
        now = time.perf_counter()
        self._next = now + max(_CONFIRMED_EVERY, 20 * (now - started))


def _require_tied(plan: Plan, sources: Sources) -> None:
    """A head that the base ties but somebody stores must be equal to the embedding, or one of them would be lost."""
    for expert in plan.experts:
        expert.alignment.require_tied(expert.checkpoint)
    for tensor in plan.tensors:
        if not tensor.is_alias:
            continue
        pairs = [("the base", sources.base, tensor.name, tensor.key)]
        for expert in plan.experts:
            names = expert.alignment.mapping
            if tensor.name in names and tensor.key in names:  # else the base's is kept there
                owner = f"expert '{expert.name}'"
                pairs.append((owner, sources.experts[expert.name], names[tensor.name], names[tensor.key]))
        for owner, reader, head, embedding in pairs:
            if head != embedding and not equal_bytes(reader, head, reader, embedding):
                raise KtmergeError(
                    f"{owner}: '{head}' differs from '{embedding}', although the base's config ties them "
                    "(tie_word_embeddings); correct the config, or the weights."
                )


def _broken_notes(tensors: Iterable[TensorReport]) -> list[str]:
    broken = [tensor for tensor in tensors if tensor.broken]
    if not broken:
        return []
    count = sum(tensor.broken for tensor in broken)
    names = ", ".join(tensor.name for tensor in broken[:3])
    return [f"{count} elements are NaN or infinite in an input and keep the base's value (in {names})."]


def _groups(tensors: Iterable[TensorPlan]) -> list[str]:
    """The kernels that a blend of these tensors begins with."""
    pipelines = {id(tensor.pipeline): tensor.pipeline for tensor in tensors if tensor.pipeline is not None}
    searched = any(use.statistics() for pipeline in pipelines.values() for use in pipeline.uses)
    return ["blend", "thresholds"] if searched else ["blend"]
