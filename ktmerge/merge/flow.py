"""One piece of a tensor through the stages of a pipeline, and the statistics that stages want to know first."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ktmerge.merge.decompositions import together
from ktmerge.merge.kernels import Kernels
from ktmerge.merge.plan import Plan, TensorPlan
from ktmerge.merge.source import Chunk, Sources
from ktmerge.merge.stage import Context, Observer, Pipeline, Place, Scope, StageUse
from ktmerge.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.lanes import Lanes

Found = dict[tuple[int, str], dict[str, Any]]
"""Results of statistics: by position of the stage and expert (empty after combining), then by name."""


class _Local(threading.local):
    """Statistics of the tensor a thread works on."""

    name = ""
    found: Found = {}  # noqa: RUF012 (replaced before it is written to)


class Flow:
    """Runs pipelines over a plan's tensors; knows stages only by what they declare.

    `prepare` gathers the statistics of global scope, in passes over all tensors they concern; those of one tensor are
    gathered when the tensor's turn comes. Several threads may each take tensors through `merged`.
    """

    def __init__(self, plan: Plan, sources: Sources, kernels: Kernels, lanes: Lanes | None = None) -> None:
        self._plan = plan
        self._sources = sources
        self._kernels = kernels
        self._lanes = lanes
        self._weights = {expert.name: expert.weight for expert in plan.experts}
        self._global: dict[str, Found] = {}
        self._local = _Local()

    def prepare(self, wanted: Sequence[TensorPlan], progress: Progress) -> None:
        """Gather all statistics of global scope that some tensors want, over all of the plan's that share them.

        Position by position, as a later one may rest on an earlier.
        """
        asked = {pool for tensor in wanted for pool in _pools(tensor)}
        pools: dict[int, dict[str, list[TensorPlan]]] = {}
        for tensor in self._plan.tensors:
            own = _pools(tensor)
            for position, prefix in own if not asked.isdisjoint(own) else ():
                pools.setdefault(position, {}).setdefault(prefix, []).append(tensor)
        for position in sorted(pools):
            self._gather_pools(pools[position], position, progress)

    def merged(self, tensor: TensorPlan) -> Iterator[tuple[Chunk, tuple[Tensor, ...], Tensor]]:
        """For each piece: what was read, the transformed deltas, and the merged delta before lambda; all flat."""
        pipeline = _pipeline(tensor)
        self._gather_local(tensor, len(pipeline.uses))
        for chunk in self._chunks(tensor):
            transformed = self._run(tensor, chunk, len(pipeline.transforms))
            merged = self._finish(tensor, chunk, transformed, len(pipeline.uses))
            yield chunk, tuple(delta.reshape(-1) for delta in transformed), merged.reshape(-1)

    def _chunks(self, tensor: TensorPlan) -> Iterator[Chunk]:
        pipeline = _pipeline(tensor)
        grain = pipeline.grain(Place(tensor.tensor_class, tensor.info.shape, tensor.layout))
        return self._sources.chunks(tensor, whole=pipeline.reach == "tensor", grain=grain, lanes=self._lanes)

    def _gather_pools(self, pools: Mapping[str, list[TensorPlan]], position: int, progress: Progress) -> None:
        observers = {
            pool: self._observers(tensors[0], position, "global", sum(t.info.numel for t in tensors if not t.is_alias))
            for pool, tensors in pools.items()
        }
        number = 0
        while open_pools := [pool for pool, found in observers.items() if _unfinished(found)]:
            number += 1
            tensors = [(pool, tensor) for pool in open_pools for tensor in pools[pool] if not tensor.is_alias]
            total = sum(tensor.info.nbytes for _, tensor in tensors)
            with progress.task(f"measure, pass {number}", total, "bytes") as step:
                for pool, tensor in tensors:
                    self._gather_local(tensor, position)
                    self._show(tensor, position, observers[pool])
                    step.advance(tensor.info.nbytes)
            _end_pass(observers[pool] for pool in open_pools)
        for pool, found in observers.items():
            self._global.setdefault(pool, {}).update(_results(found))

    def _gather_local(self, tensor: TensorPlan, stop: int) -> None:
        """Gather the statistics of tensor scope of all stages before position ``stop``."""
        if self._local.name != tensor.name:
            self._local.name, self._local.found = tensor.name, {}
        for position in range(stop):
            known = any(key[0] == position for key in self._local.found)
            if known or not _pipeline(tensor).uses[position].wants("tensor"):
                continue
            observers = self._observers(tensor, position, "tensor", tensor.info.numel)
            while _unfinished(observers):
                self._show(tensor, position, observers)
                _end_pass([observers])
            self._local.found.update(_results(observers))

    def _observers(self, tensor: TensorPlan, position: int, scope: Scope, elements: int) -> _Observers:
        pipeline = _pipeline(tensor)
        statistics = [one for one in pipeline.uses[position].statistics() if one.scope == scope]
        experts = list(tensor.sources) if position < len(pipeline.transforms) else [""]
        return {(position, expert): {one.name: one.observer(elements) for one in statistics} for expert in experts}

    def _show(self, tensor: TensorPlan, position: int, observers: _Observers) -> None:
        """Show the observers every piece of a tensor, as the stage at ``position`` will get it."""
        pipeline = _pipeline(tensor)
        count = len(pipeline.transforms)
        for chunk in self._chunks(tensor):
            deltas = self._run(tensor, chunk, min(position, count))
            merged = self._finish(tensor, chunk, deltas, position) if position > count else None
            use = pipeline.uses[position]
            for (_, expert), named in observers.items():
                context = self._context(tensor, chunk, position, expert)
                values: Any = [_shaped(tensor, use, delta) for delta in deltas]
                if merged is not None:
                    values = _shaped(tensor, use, merged)
                elif expert:
                    values = values[list(tensor.sources).index(expert)]
                for observer in named.values():
                    if not observer.done:
                        observer.observe(values, context)

    def _run(self, tensor: TensorPlan, chunk: Chunk, stop: int) -> list[Tensor]:
        """All deltas through the transforms before position ``stop``."""
        pipeline = _pipeline(tensor)
        deltas: list[Tensor] = list(chunk.deltas)
        for position, use in enumerate(pipeline.transforms[:stop]):
            deltas = [_shaped(tensor, use, delta) for delta in deltas]
            contexts = [self._context(tensor, chunk, position, expert) for expert in tensor.sources]
            pairs = list(zip(deltas, contexts, strict=True))
            apply = partial(_applied, use)
            deltas = together(apply, pairs) if use.reach == "tensor" else [apply(pair) for pair in pairs]
        return deltas

    def _finish(self, tensor: TensorPlan, chunk: Chunk, deltas: list[Tensor], stop: int) -> Tensor:
        """Combine, then the stages after it and before position ``stop``."""
        pipeline = _pipeline(tensor)
        first = len(pipeline.transforms)
        combine = pipeline.combine
        deltas = [_shaped(tensor, combine, delta) for delta in deltas]
        merged = combine.stage.apply(deltas, combine.parameters, self._context(tensor, chunk, first))
        for position, use in enumerate(pipeline.after[: stop - first - 1], first + 1):
            context = self._context(tensor, chunk, position)
            merged = _shaped(tensor, use, merged)
            if use.stage.kind == "scale":
                merged = use.stage.apply(merged, use.parameters, context)
            else:
                own = [_shaped(tensor, use, delta) for delta in chunk.deltas]
                merged = use.stage.apply(merged, own, use.parameters, context)
        return merged

    def _context(self, tensor: TensorPlan, chunk: Chunk, position: int, expert: str = "") -> Context:
        pipeline = _pipeline(tensor)
        statistics: dict[str, Any] = {}
        if pipeline.uses[position].statistics():
            pool = self._global.get(pipeline.prefix(position), {})
            for found in (pool, self._local.found):
                statistics |= found.get((position, expert), {})
        use = pipeline.uses[position]
        base = _shaped(tensor, use, chunk.base.float())
        return Context(
            tensor=tensor.key,
            part=tensor.part,
            layers=self._plan.layers,
            tensor_class=tensor.tensor_class,
            shape=tensor.info.shape,
            start=chunk.start,
            seed=self._plan.recipe.seed,
            experts=tuple(tensor.sources),
            weights=tuple(self._weights[name] for name in tensor.sources),
            base=base,
            kernels=self._kernels,
            expert=expert,
            statistics=statistics,
            layout=tensor.layout,
            measured=self._sources.measurements(tensor, chunk.start, base) if use.stage.needs(use.parameters) else None,
            deltas=tuple(chunk.deltas),
            output=tensor.dtype,
        )


_Observers = dict[tuple[int, str], dict[str, Observer]]


def _pipeline(tensor: TensorPlan) -> Pipeline:
    if tensor.pipeline is None:
        raise ValueError(f"'{tensor.name}' is not blended")
    return tensor.pipeline


def _shaped(tensor: TensorPlan, use: StageUse, values: Tensor) -> Tensor:
    """Values as a stage takes them: shaped if it works on whole tensors, else flat, whatever the others do."""
    return values.reshape(tensor.info.shape if use.reach == "tensor" else -1)


def _applied(use: StageUse, pair: tuple[Tensor, Context]) -> Tensor:
    transformed: Tensor = use.stage.apply(pair[0], use.parameters, pair[1])
    return transformed


def _pools(tensor: TensorPlan) -> list[tuple[int, str]]:
    return tensor.pipeline.pools() if tensor.pipeline is not None else []


def _unfinished(observers: _Observers) -> bool:
    return any(not one.done for named in observers.values() for one in named.values())


def _end_pass(groups: Any) -> None:
    for observers in groups:
        for named in observers.values():
            for one in named.values():
                if not one.done:
                    one.end_pass()


def _results(observers: _Observers) -> Found:
    return {key: {name: one.result() for name, one in named.items()} for key, named in observers.items()}
