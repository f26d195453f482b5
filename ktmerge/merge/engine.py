"""Plan to tensors: reads, runs the stages, rounds once, hands to a sink. Fixed memory, whatever the model's size."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ktmerge.checkpoints.dtypes import tag_of, torch_dtype
from ktmerge.errors import KtmergeError
from ktmerge.merge.flow import Flow
from ktmerge.merge.fused import Fused
from ktmerge.merge.kernels import Kernels, kernels_for
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.plan import Plan, TensorPlan
from ktmerge.merge.report import BlendReport, TensorReport
from ktmerge.merge.sinks import Sink, require_device
from ktmerge.merge.source import CHUNK, Chunk, Sources, changed_buffers, equal_bytes
from ktmerge.progress import SILENT, Progress, Step

if TYPE_CHECKING:
    from torch import Tensor


def execute(
    plan: Plan, sink: Sink, device: str = "auto", progress: Progress = SILENT, *, chunk: int = CHUNK
) -> BlendReport:
    """Carry out a plan.

    Args:
        plan: what becomes of every tensor.
        sink: where the tensors go.
        device: auto, cpu or cuda.
        progress: where to report.
        chunk: elements worked on at a time; changes memory, never the result.

    Raises:
        UsageError: the device is not there, or a tied head differs from its embedding.
        KtmergeError: an input is not finite, cannot be read or was changed; a value overflows the output's type.
    """
    started = time.perf_counter()
    place = require_device(device)
    report = BlendReport(plan.recipe.name, [], device=str(place), notes=list(plan.notes))
    with torch.inference_mode(), Sources(plan, place, chunk) as sources:
        _require_tied(plan, sources)
        report.notes += _buffer_notes(plan, sources)
        with Fused(plan, sources, place, chunk) as fused:
            engine = _Engine(plan, sink, sources, place, fused)
            engine.flow.prepare(progress)
            total = sum(tensor.info.nbytes for tensor in plan.tensors)
            with progress.task("blend", total, "bytes") as step:
                for tensor in plan.tensors:
                    report.tensors.append(engine.do(tensor, step))
        sources.check_unchanged()
    report.read = plan.base.nbytes + sum(expert.checkpoint.nbytes for expert in plan.experts)
    report.written = engine.written
    report.seconds = time.perf_counter() - started
    return report


class _Engine:
    """One run: what every tensor needs on its way."""

    def __init__(self, plan: Plan, sink: Sink, sources: Sources, device: torch.device, fused: Fused) -> None:
        self._plan = plan
        self._sink = sink
        self._sources = sources
        self._device = device
        self._kernels: Kernels = kernels_for(device)
        self._fused = fused
        self.flow = Flow(plan, sources, self._kernels, fused)
        self.written = 0

    def do(self, tensor: TensorPlan, step: Step) -> TensorReport:
        """Make one tensor."""
        result = TensorReport(tensor.name, tensor.part, tensor.method, tensor.info.numel)
        if tensor.action == "blend":
            self._blend(tensor, result, step)
        else:
            self._take(tensor, step)
        return result

    def _take(self, tensor: TensorPlan, step: Step) -> None:
        """Another's tensor as it is; rounded only if the output's type is another."""
        expert = tensor.expert
        reader = self._sources.base if expert is None else self._sources.experts[expert]
        source = tensor.name if expert is None else tensor.sources[expert]
        checkpoint = self._plan.base if expert is None else self._plan.expert(expert).checkpoint
        tag = self._sink.dtype(tensor.name, tensor.dtype)
        if checkpoint.tensors[source].dtype == tag:
            self._sink.copy(tensor.name, reader, source)
            self.written += tensor.info.nbytes
            step.advance(tensor.info.nbytes)
            return
        width = tensor.info.nbytes / max(tensor.info.numel, 1)
        for start in range(0, tensor.info.numel, CHUNK):
            values = reader.read(source, start, min(start + CHUNK, tensor.info.numel)).to(self._device)
            self._write(tensor, values, start, tag)
            step.advance(values.numel() * width)

    def _blend(self, tensor: TensorPlan, result: TensorReport, step: Step) -> None:
        tag = self._sink.dtype(tensor.name, tensor.dtype)
        width = tensor.info.nbytes / max(tensor.info.numel, 1)
        if self._fused.blend(tensor, self.flow.found(tensor, 0, "threshold"), self._sink, tag, result, step):
            self.written += tensor.info.numel * torch_dtype(tag).itemsize
            return
        for chunk, transformed, merged in self.flow.merged(tensor):
            scaled = merged if tensor.lambda_ == 1 else merged * tensor.lambda_
            stored = self._write(tensor, settle(chunk, scaled), chunk.start, tag)
            _measure(result, chunk, scaled, stored)
            if tensor.pipeline is not None and tensor.pipeline.transforms:
                for name, delta in zip(tensor.sources, transformed, strict=True):
                    result.kept[name] = result.kept.get(name, 0) + int(torch.count_nonzero(delta))
            step.advance(merged.numel() * width)

    def _write(self, tensor: TensorPlan, values: Tensor, start: int, tag: str) -> Tensor:
        """Round once and hand to the sink."""
        dtype = torch_dtype(tag)
        recipe = self._plan.recipe
        if dtype.is_floating_point:
            _refuse_overflow(tensor, values, dtype)
            key = stream_key(recipe.seed, "round", "", tensor.key)
            rounded = self._kernels.round(values, dtype, recipe.output.rounding, key, start)
        else:
            rounded = values.to(dtype)
        self._sink.write(tensor.name, rounded, start)
        self.written += rounded.numel() * rounded.element_size()
        return rounded


def settle(chunk: Chunk, merged: Tensor) -> Tensor:
    """theta_0 + M, and exactly what was there where M says so.

    Where M is 0 the result is theta_0 bit for bit (a negative zero included); where M is the delta of an expert it is
    that expert's own value, which theta_0 + tau may miss by the rounding of both; of several, the first.
    """
    values = chunk.base + merged
    for expert, delta in reversed(list(zip(chunk.experts, chunk.deltas, strict=True))):
        values = torch.where(merged == delta, expert, values)
    return torch.where(merged == 0, chunk.base, values)


def _measure(result: TensorReport, chunk: Chunk, merged: Tensor, stored: Tensor) -> None:
    base = chunk.base.float()
    moved = stored.float() - base
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
            pairs.append(
                (f"expert '{expert.name}'", sources.experts[expert.name], names[tensor.name], names[tensor.key])
            )
        for owner, reader, head, embedding in pairs:
            if head != embedding and not equal_bytes(reader, head, reader, embedding):
                raise KtmergeError(
                    f"{owner}: '{head}' differs from '{embedding}', although the base's config ties them "
                    "(tie_word_embeddings); correct the config, or the weights."
                )


def _buffer_notes(plan: Plan, sources: Sources) -> list[str]:
    return [
        f"{expert}: {len(names)} buffers differ from the base's, which are kept ({', '.join(names[:3])})."
        for expert, names in changed_buffers(plan, sources).items()
    ]
