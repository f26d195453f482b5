"""The fast way for element-wise pipelines on the CPU: compiled kernels over raw pieces, on all cores.

Reading, arithmetic and writing of different pieces overlap, as none of them holds the interpreter's lock. Whatever is
not covered here takes the general way, and every result equals it bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.kernels.radix import MagnitudeThreshold, Threshold
from ktmerge.merge.methods.ties import relative

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

    from numpy.typing import NDArray

    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.report import TensorReport
    from ktmerge.merge.sinks import Sink
    from ktmerge.merge.source import Sources
    from ktmerge.merge.stage import Observer, Pipeline
    from ktmerge.progress import Step

PIECE = 1 << 19
"""Elements of a piece; a multiple of 4, as random words come in fours."""

_RAW = {"BF16": np.uint16, "F32": np.uint32}
_TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class _Program:
    """What the compiled kernel does for one pipeline: codes and numbers, no names."""

    transform: int
    combine: int
    votes: Sequence[float]
    weights: Sequence[float]
    density: float = 1.0
    factor: float = 1.0


class Fused:
    """The fast way over one plan; a context manager that holds threads.

    Args:
        plan: what is to be done.
        sources: the open inputs.
        device: pieces are worked on here only if it is the CPU.
        chunk: most elements of a piece.
    """

    def __init__(self, plan: Plan, sources: Sources, device: torch.device, chunk: int = PIECE) -> None:
        self._piece = max(4, min(PIECE, chunk) // 4 * 4)
        self._plan = plan
        self._sources = sources
        self._weights = {expert.name: expert.weight for expert in plan.experts}
        self._kernels = _compiled() if device.type == "cpu" else None
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "blend") if self._kernels is not None else None

    def __enter__(self) -> Fused:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for work under way, drop what has not begun, and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def observe(self, tensor: TensorPlan, observers: Mapping[tuple[int, str], Mapping[str, Observer]]) -> bool:
        """Show magnitude thresholds every piece of a tensor, as deltas come from the experts; False if it cannot."""
        flat = {expert: list(named.values()) for (_, expert), named in observers.items()}
        if self._kernels is None or not self._readable(tensor) or set(flat) != set(tensor.sources):
            return False
        if any(len(found) != 1 or not isinstance(found[0], MagnitudeThreshold) for found in flat.values()):
            return False
        thresholds = {expert: cast(MagnitudeThreshold, found[0]) for expert, found in flat.items()}
        wanted = {expert: one for expert, one in thresholds.items() if not one.done}
        self._hold(tensor)

        def count(piece: tuple[int, int]) -> list[NDArray[np.int64]] | None:
            base, experts = self._raw(tensor, *piece)
            return [self._histogram(tensor, expert, one, base, experts, piece[0]) for expert, one in wanted.items()]

        totals = {expert: np.zeros(1 << 16, np.int64) for expert in wanted}
        for counted in self._each(tensor, count):
            if counted is None or any(one.size == 0 for one in counted):
                return False  # an input is not finite: the general way says where
            for total, one in zip(totals.values(), counted, strict=True):
                total += one
        for expert, total in totals.items():
            wanted[expert].add(torch.from_numpy(total))
        return True

    def blend(
        self,
        tensor: TensorPlan,
        thresholds: Mapping[str, Threshold],
        sink: Sink,
        tag: str,
        result: TensorReport,
        step: Step,
    ) -> bool:
        """Make a tensor whole and hand it to the sink; False if this way does not cover it."""
        program = self._program(tensor)
        rounding = self._plan.recipe.output.rounding
        if program is None or tag not in _RAW or (program.transform == 1) != bool(thresholds):
            return False
        kernels = self._kernels
        assert kernels is not None
        numbers = self._numbers(tensor, program, thresholds)
        round_key = np.uint64(stream_key(self._plan.recipe.seed, "round", "", tensor.key))
        stochastic = rounding == "stochastic" and tag == "BF16"
        width = tensor.info.nbytes / max(tensor.info.numel, 1)
        self._hold(tensor)

        def work(piece: tuple[int, int]) -> tuple[int, int, NDArray[np.float64], NDArray[np.int64]]:
            start, stop = piece
            base, experts = self._raw(tensor, start, stop)
            out = np.empty(stop - start, _RAW[tag])
            sums, kept = np.zeros(4), np.zeros(len(tensor.sources), np.int64)
            status = kernels.blend(
                _pair(base), _pair(experts), start, *numbers, stochastic, round_key, _pair(out), sums, kept
            )
            if status == kernels.FINE:
                signed = out.view(np.int16 if tag == "BF16" else np.int32)
                sink.write(tensor.name, torch.from_numpy(signed).view(_TORCH[tag]), start)
            return status, stop - start, sums, kept

        totals, counts = np.zeros(4), np.zeros(len(tensor.sources), np.int64)
        for status, elements, sums, kept in self._each(tensor, work):
            if status != kernels.FINE:
                return False  # the general way finds the same and says where
            totals += sums
            counts += kept
            step.advance(elements * width)
        result.intended, result.base, result.along = (float(total) for total in totals[:3])
        result.changed = int(totals[3])
        if program.transform:
            result.kept = dict(zip(tensor.sources, counts.tolist(), strict=True))
        return True

    def _each(self, tensor: TensorPlan, work: Any) -> Iterator[Any]:
        """``work`` on every piece, on all cores, results in order; few pieces at a time, so that memory is bounded."""
        assert self._pool is not None
        starts = range(0, tensor.info.numel, self._piece)
        pieces = [(start, min(start + self._piece, tensor.info.numel)) for start in starts]
        if len(pieces) == 1:
            yield work(pieces[0])
            return
        ahead = 2 * (os.cpu_count() or 1)
        running = [self._pool.submit(work, piece) for piece in pieces[:ahead]]
        following = iter(pieces[ahead:])
        while running:
            result = running.pop(0).result()
            for piece in following:
                running.append(self._pool.submit(work, piece))
                break
            yield result

    def _program(self, tensor: TensorPlan) -> _Program | None:
        if self._kernels is None or not self._readable(tensor) or tensor.pipeline is None:
            return None
        weights = [self._weights[name] for name in tensor.sources]
        return program(tensor.pipeline, weights, self._kernels)

    def _readable(self, tensor: TensorPlan) -> bool:
        """Whether all inputs have a type the kernels read, experts all the same one."""
        tags = {self._plan.expert(name).checkpoint.tensors[source].dtype for name, source in tensor.sources.items()}
        return tensor.info.numel > 0 and tensor.info.dtype in _RAW and len(tags) == 1 and tags <= _RAW.keys()

    def _hold(self, tensor: TensorPlan) -> None:
        """Let the sources read a small tensor once, before threads ask for it."""
        self._sources.native(tensor, 0, 1)

    def _raw(self, tensor: TensorPlan, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        base, *experts = (_patterns(values) for values in self._sources.native(tensor, start, stop))
        return base, np.stack(experts)

    def _histogram(
        self,
        tensor: TensorPlan,
        expert: str,
        observer: MagnitudeThreshold,
        base: NDArray[Any],
        experts: NDArray[Any],
        start: int,
    ) -> NDArray[np.int64]:
        """Counts of the observer's next digit in one piece; empty if an input is not finite."""
        kernels = self._kernels
        assert kernels is not None
        other = experts[list(tensor.sources).index(expert)]
        prefix = observer.prefix
        first, second = (*prefix[:2], 0, 0)[:2]
        hashed = 0
        for digit in prefix[2:]:
            hashed = hashed << 16 | digit
        key = stream_key(self._plan.recipe.seed, "trim", expert, tensor.key)
        counts = np.zeros(1 << 16, np.int64)
        status = kernels.histogram(
            _pair(base), _pair(other), start, np.uint64(key), len(prefix), first, second, np.uint64(hashed), counts
        )
        return counts if status == kernels.FINE else counts[:0]

    def _numbers(self, tensor: TensorPlan, program: _Program, thresholds: Mapping[str, Threshold]) -> tuple[Any, ...]:
        """The kernel's arguments from ``transform`` to ``lambda_``."""
        names = list(tensor.sources)
        purpose = "trim" if program.transform == 1 else "dare"
        keys = [stream_key(self._plan.recipe.seed, purpose, name, tensor.key) for name in names]
        least = [least_key(thresholds[name]) if thresholds else (0, 0, 0) for name in names]
        floors, highs, lows = (np.array(column, np.uint32) for column in zip(*least, strict=True))
        count = len(names)
        return (
            program.transform,
            floors,
            highs,
            lows,
            np.array(keys, np.uint64),
            np.full(count, round(program.density * 2**32), np.uint64),
            np.full(count, program.factor, np.float32),
            program.combine,
            np.array(program.votes, np.float32),
            np.array(program.weights, np.float32),
            np.float32(tensor.lambda_),
        )


def program(pipeline: Pipeline, weights: Sequence[float], kernels: Any) -> _Program | None:
    """The kernel's program for a pipeline, or None if it has none."""
    if pipeline.after or len(pipeline.transforms) > 1:
        return None
    combined = _combination(pipeline, weights, kernels)
    if combined is None:
        return None
    if not pipeline.transforms:
        return _Program(kernels.NONE, *combined)
    use = pipeline.transforms[0]
    given: Any = use.parameters
    if use.stage.name == "trim":
        return _Program(kernels.TRIM, *combined)
    if use.stage.name == "dare" and given.rescale in ("unbiased", "none"):
        factor = 1 / given.density if given.rescale == "unbiased" and given.density else 1.0
        return _Program(kernels.DROP, *combined, density=given.density, factor=factor)
    return None


def _combination(
    pipeline: Pipeline, weights: Sequence[float], kernels: Any
) -> tuple[int, Sequence[float], Sequence[float]] | None:
    name, given = pipeline.combine.stage.name, pipeline.combine.parameters
    if name == "sum":
        return kernels.SUM, weights, weights
    if name == "mean":
        total = sum(weights)
        shares = [weight / total for weight in weights]
        return kernels.SUM, shares, shares
    options: Any = given
    if name == "elect" and options.aggregate == "wmean" and options.tie == "zero" and options.elect != "count":
        shares = relative(weights)
        return kernels.ELECT, shares if options.elect == "weighted" else [1.0] * len(weights), shares
    return None


def least_key(threshold: Threshold) -> tuple[int, int, int]:
    """The least key that is kept: magnitude pattern, and the two words of the hash that ties need."""
    if threshold.keeps_all:
        return 0, 0, 0
    if threshold.keeps_none:
        return 1 << 31, 0, 0
    first, second, *hashed = (*threshold.prefix, 0, 0, 0, 0, 0)[:6]
    return first << 15 | second, hashed[0] << 16 | hashed[1], hashed[2] << 16 | hashed[3]


def _patterns(values: torch.Tensor) -> NDArray[Any]:
    """The bit patterns of a flat tensor, without a copy."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.view(torch.int32).numpy().view(np.uint32)


def _pair(raw: NDArray[Any]) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """The form the kernels take: one array for bf16 and one for fp32, of which one is empty."""
    nothing = (0,) * raw.ndim
    if raw.dtype == np.uint16:
        return raw, np.empty(nothing, np.uint32)
    return np.empty(nothing, np.uint16), raw


def _compiled() -> ModuleType | None:
    """The compiled kernels, or None where numba is not installed or is switched off."""
    if os.environ.get("KTMERGE_KERNELS") == "reference":
        return None
    try:
        from ktmerge.merge.kernels import compiled
    except ImportError:
        return None
    return compiled
