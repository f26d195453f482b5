"""The general way of a tensor: every stage a torch function, here or on a device.

It is what the compiled kernels are held against.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ktmerge.checkpoints.dtypes import tag_of, torch_dtype
from ktmerge.checkpoints.workers import Workers
from ktmerge.errors import KtmergeError
from ktmerge.merge.device import cores
from ktmerge.merge.flow import Flow
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.kernels.codes import FINE
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.kernels.native import native
from ktmerge.merge.merged import MergedDeltasOfPlan
from ktmerge.merge.plan import Plan, TensorPlan
from ktmerge.merge.report import TensorReport
from ktmerge.merge.settling import settle_given
from ktmerge.merge.sinks import LiveSink, Sink
from ktmerge.merge.source import CHUNK, DEVICE_CHUNK, Chunk, Sources
from ktmerge.merge.workspace import KINDS, WIDTHS, Target
from ktmerge.progress import Progress

if TYPE_CHECKING:
    from ktmerge.merge.lanes import Lanes

_FEEDERS = 3
"""Threads that give a device work."""
_ROOM = 1 << 28
"""Bytes a core that whole tensors under work may take together; one that is larger is worked on alone."""


class _Room:
    """Lets through as many at a time as fit into so many bytes, and always one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._turn = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Wait until there is room for ``size`` bytes, and hold it."""
        with self._turn:
            self._turn.wait_for(lambda: not self._taken or self._taken + size <= self._size)
            self._taken += size
        try:
            yield
        finally:
            with self._turn:
                self._taken -= size
                self._turn.notify_all()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """No threads within an operation, whose number would show in the last bit of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class General:
    """Takes tensors through their stages.

    Args:
        plan: what becomes of every tensor.
        sink: where they go.
        sources: the open inputs.
        lanes: to the device to work on, if it is not to be done here; of portable pipelines only.
        merged: takes the merged deltas, for other blends of the same; of what is done here.
    """

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        sources: Sources,
        lanes: Lanes | None = None,
        merged: MergedDeltasOfPlan | None = None,
    ) -> None:
        self._plan = plan
        self._sink = sink
        self._sources = sources
        self._lanes = lanes
        self._merged = merged if lanes is None else None
        self._kernels = kernels_for(torch.device("cpu") if lanes is None else lanes.device)
        self._native = native() if lanes is None else None
        self._flow = Flow(plan, sources, self._kernels, lanes)
        self._leaving: dict[str, list[Future[None]]] = {}

    def prepare(self, tensors: Sequence[TensorPlan], progress: Progress) -> None:
        """Gather what these tensors have to know of others.

        Raises:
            KtmergeError: an input is not finite, or the device's memory is full.
        """
        with torch.inference_mode(), _one_thread_each(), self._computing():
            self._flow.prepare(tensors, progress)

    def run(self, tensors: Sequence[TensorPlan]) -> Generator[tuple[TensorPlan, TensorReport], None, None]:
        """Make these of the plan's tensors: several at a time, each on one core.

        So sums and decompositions give the same bits however many cores there are, and no core waits for another. A
        device is given work by several, so that one reads while another waits for it.

        Raises:
            KtmergeError: an input is not finite, a value overflows the output's type, or the device's memory is full.
        """
        workers = min(cores() if self._lanes is None else _FEEDERS, len(tensors))
        if workers < 2:
            with _one_thread_each():
                for tensor in tensors:
                    yield tensor, self._make(tensor)
            return
        room = _Room(_ROOM * workers)
        with _one_thread_each(), Workers(workers, "blend") as pool:
            yield from pool.in_order((partial(self._make_within, room, tensor) for tensor in tensors), 2 * workers)

    def _make_within(self, room: _Room, tensor: TensorPlan) -> tuple[TensorPlan, TensorReport]:
        whole = tensor.pipeline is not None and tensor.pipeline.reach == "tensor"
        with room.take(4 * tensor.info.numel * (3 + 2 * len(tensor.sources)) if whole else 0):
            return tensor, self._make(tensor)

    def _make(self, tensor: TensorPlan) -> TensorReport:
        result = TensorReport(tensor.name, tensor.part, tensor.method, tensor.info.numel)
        with torch.inference_mode(), self._computing():
            if tensor.action == "blend":
                self._blend(tensor, result)
            else:
                self._convert(tensor)
            for one in self._leaving.pop(tensor.name, ()):
                one.result()
        return result

    def _computing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._lanes is None else self._lanes.computing()

    def _convert(self, tensor: TensorPlan) -> None:
        """Another's tensor, rounded to the output's type."""
        expert = tensor.expert
        source = tensor.name if expert is None else tensor.sources[expert]
        tag = self._sink.dtype(tensor.name, tensor.dtype)
        for start in range(0, tensor.info.numel, CHUNK):
            values = self._sources.of(expert).read(source, start, min(start + CHUNK, tensor.info.numel))
            if torch_dtype(tag).is_floating_point:
                _refuse_overflow(tensor, values, torch_dtype(tag))
            self._write(tensor, values, start, tag)

    def _blend(self, tensor: TensorPlan, result: TensorReport) -> None:
        tag = self._sink.dtype(tensor.name, tensor.dtype)
        for whole, transformed, found in self._flow.merged(tensor):
            if tensor.pipeline is not None and tensor.pipeline.transforms:
                for name, delta in zip(tensor.sources, transformed, strict=True):
                    result.kept[name] = result.kept.get(name, 0) + int(torch.count_nonzero(delta))
            self._store(tensor, result, whole, found, tag)

    def _store(self, tensor: TensorPlan, result: TensorReport, whole: Chunk, found: Tensor, tag: str) -> None:
        """Scale, settle, round and write a merged delta, some elements at a time: no further copy of a whole tensor."""
        size = CHUNK if self._lanes is None else DEVICE_CHUNK
        for start in range(0, whole.base.numel(), size):
            chunk, merged = whole.part(start, start + size), found[start : start + size]
            if not self._store_compiled(tensor, result, chunk, merged, tag):
                scaled = merged if tensor.lambda_ == 1 else merged * tensor.lambda_
                values = settle(chunk, scaled)
                _refuse_overflow(tensor, values, torch_dtype(tag))
                if chunk.broken is not None:
                    values = torch.where(chunk.broken, chunk.own.to(values.dtype), values)
                    result.broken += int(torch.count_nonzero(chunk.broken))
                _measure(result, chunk, scaled, self._write(tensor, values, chunk.start, tag, chunk))
            if self._merged is not None:
                self._merged.add(tensor, chunk.start, merged, result.kept)

    def _store_compiled(self, tensor: TensorPlan, result: TensorReport, chunk: Chunk, merged: Tensor, tag: str) -> bool:
        """The same of a chunk in one pass; False if it was not done, because the kernels do not cover it or refuse."""
        rows = (chunk.own, *chunk.experts)
        tags = [tag_of(row.dtype) for row in rows]
        stochastic = self._plan.recipe.output.rounding == "stochastic" and tag != "F32"
        if self._native is None or chunk.broken is not None or not {tag, *tags} <= KINDS.keys():
            return False
        if stochastic and (tag != "BF16" or chunk.start % 4):
            return False
        key = stream_key(self._plan.recipe.seed, "round", "", tensor.key)
        target = Target(KINDS[tag], stochastic, key, tensor.lambda_)
        merged = merged.contiguous()
        done = settle_given(
            self._native, [KINDS[one] for one in tags], [row.data_ptr() for row in rows], merged.data_ptr(),
            merged.numel(), chunk.start, target,
        )  # fmt: skip
        if done.status != FINE:
            return False
        self._sink.write_bytes(tensor.name, done.data, chunk.start * WIDTHS[target.kind])
        intended, base, along, changed = done.sums.tolist()
        result.intended += intended
        result.base += base
        result.along += along
        result.changed += int(changed)
        return True

    def _write(self, tensor: TensorPlan, values: Tensor, start: int, tag: str, chunk: Chunk | None = None) -> Tensor:
        """Round once and hand to the sink; what is broken keeps the base's bits: devices convert a NaN differently."""
        dtype = torch_dtype(tag)
        recipe = self._plan.recipe
        if dtype.is_floating_point:
            key = stream_key(recipe.seed, "round", "", tensor.key)
            rounded = self._kernels.round(values, dtype, recipe.output.rounding, key, start)
        else:
            rounded = values.to(dtype)
        if chunk is not None and chunk.broken is not None and chunk.own.dtype == dtype:
            rounded = torch.where(chunk.broken, chunk.own, rounded)
        if self._lanes is None or isinstance(self._sink, LiveSink):
            self._sink.write(tensor.name, rounded, start)
        else:
            first = start * dtype.itemsize
            coming = self._lanes.download(
                rounded, lambda data, begin: self._sink.write_bytes(tensor.name, data, first + begin)
            )
            self._leaving.setdefault(tensor.name, []).extend(coming)
        return rounded


def settle(chunk: Chunk, merged: Tensor) -> Tensor:
    """theta_0 + M, and exactly what was there where M says so.

    Where M is 0 the result is theta_0 bit for bit (a negative zero included); where M is the delta of an expert it is
    that expert's own value, which theta_0 + tau may miss by the rounding of both; of several, the first.
    """
    values = chunk.base + merged
    for expert, delta in reversed(list(zip(chunk.experts, chunk.deltas, strict=True))):
        values = torch.where(merged == delta, expert.to(values.dtype), values)
    return torch.where(merged == 0, chunk.base, values)


def _measure(result: TensorReport, chunk: Chunk, merged: Tensor, stored: Tensor) -> None:
    base = chunk.base.float()
    moved = stored.float() - base
    if chunk.broken is not None:
        moved = torch.where(chunk.broken, 0.0, moved)
        merged = torch.where(chunk.broken, 0.0, merged)
    result.intended += float(torch.dot(merged, merged))
    result.base += float(torch.dot(base, base))
    result.along += float(torch.dot(moved, merged))
    result.changed += int(torch.count_nonzero(moved))


def _refuse_overflow(tensor: TensorPlan, values: Tensor, dtype: torch.dtype) -> None:
    """Values beyond the output type's range would become infinite, or stop at its end; NaN is refused with them."""
    limit = torch.finfo(dtype).max
    if not values.numel() or float(values.abs().max()) <= limit:
        return
    count = int((~(values.abs() <= limit)).sum())
    raise KtmergeError(
        f"tensor '{tensor.name}': {count} blended values are beyond the range of {tag_of(dtype)} "
        f"(largest {limit:.4g}); check lambda and weights, or write output.dtype: bfloat16 or float32."
    )
