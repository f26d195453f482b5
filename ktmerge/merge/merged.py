"""Merged deltas kept in memory, so that a sweep of lambda takes a tensor through its stages once."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.stage import Pipeline

Key = tuple[str, str, str]
"""Models and what else all tensors share, stages, and a tensor's name."""
_SHARE = 4
"""What is kept takes at most one part in so many of the machine's memory."""


@dataclass
class MergedDelta:
    """The merged delta of one tensor before lambda.

    Attributes:
        values: fp32, flat.
        kept: per expert, number of non-zero elements after the transforms.
        filled: elements that are there so far.
    """

    values: NDArray[np.float32]
    kept: dict[str, int] = field(default_factory=dict)
    filled: int = 0

    @property
    def whole(self) -> bool:
        return self.filled == self.values.size


class MergedDeltas:
    """Merged deltas by what decides them; those not used for longest make room."""

    def __init__(self, most: int | None = None) -> None:
        self._most = memory() // _SHARE if most is None else most
        self._held: OrderedDict[Key, MergedDelta] = OrderedDict()
        self._size = 0
        self._asked: set[int] = set()
        self._lock = threading.Lock()

    def holds(self, elements: int) -> bool:
        """Whether there can be room for so many."""
        return 4 * elements <= self._most

    def ask(self, key: object) -> bool:
        """Whether this was asked before."""
        known = hash(key) in self._asked
        self._asked.add(hash(key))
        return known

    def get(self, key: Key) -> MergedDelta | None:
        """What was kept, if it is whole."""
        with self._lock:
            found = self._held.get(key)
            if found is None or not found.whole:
                return None
            self._held.move_to_end(key)
            return found

    def begin(self, key: Key, elements: int) -> MergedDelta | None:
        """Room for a new one; None if it is too large."""
        with self._lock:
            if not self.holds(elements):
                return None
            if (old := self._held.pop(key, None)) is not None:
                self._size -= old.values.nbytes
            while self._held and self._size + 4 * elements > self._most:
                self._size -= self._held.popitem(last=False)[1].values.nbytes
            made = self._held[key] = MergedDelta(np.empty(elements, np.float32))
            self._size += made.values.nbytes
            return made


class MergedDeltasOfPlan:
    """The merged deltas of one plan's tensors.

    Args:
        held: where they are kept.
        plan: theirs.
        models: what decides the values of its base and experts.

    Attributes:
        fits: whether there is room for all of them.
    """

    def __init__(self, held: MergedDeltas, plan: Plan, models: str) -> None:
        self._held, self._plan = held, plan
        weights = {expert.name: expert.weight for expert in plan.experts}
        measured = {name: one.digest for name, one in plan.statistics.items()}
        output = plan.recipe.output
        self._common = json.dumps([models, plan.recipe.seed, output.dtype, output.not_finite, weights, measured])
        self._specs: dict[int, str] = {}
        self._open: dict[str, MergedDelta] = {}
        self._wanted: dict[int, bool] = {}
        self.fits = held.holds(sum(tensor.info.numel for tensor in plan.tensors if tensor.pipeline is not None))

    def get(self, tensor: TensorPlan) -> MergedDelta | None:
        """The merged delta of a tensor, if it was kept."""
        return None if tensor.pipeline is None else self._held.get(self._key(tensor, tensor.pipeline))

    def is_wanted(self, tensor: TensorPlan) -> bool:
        """Whether that of a tensor, which costs little to make again, is to be kept: if an earlier plan asked the same,
        and there is room for those of all tensors."""
        pipeline = tensor.pipeline
        if pipeline is None or not self.fits:
            return False
        if id(pipeline) not in self._wanted:
            self._wanted[id(pipeline)] = self._held.ask(self._key(tensor, pipeline)[:2])
        return self._wanted[id(pipeline)]

    def begin(self, tensor: TensorPlan) -> MergedDelta | None:
        """Room for that of a tensor, if there can be."""
        pipeline = tensor.pipeline
        return None if pipeline is None else self._held.begin(self._key(tensor, pipeline), tensor.info.numel)

    def add(self, tensor: TensorPlan, start: int, merged: Tensor, kept: Mapping[str, int]) -> None:
        """Take in the elements from ``start`` on; ``kept`` is that of all elements up to there."""
        if start == 0 and (made := self.begin(tensor)) is not None:
            self._open[tensor.name] = made
        held = self._open.get(tensor.name)
        if held is not None:
            held.values[start : start + merged.numel()] = merged.numpy()
            held.kept = dict(kept)
            held.filled += merged.numel()

    def _key(self, tensor: TensorPlan, pipeline: Pipeline) -> Key:
        if id(pipeline) not in self._specs:
            self._specs[id(pipeline)] = json.dumps([pipeline.spec(), self._pools(pipeline)])
        return self._common, self._specs[id(pipeline)], tensor.name

    def _pools(self, pipeline: Pipeline) -> list[Any]:
        """Of every stage that asks for something of several tensors: which they are."""
        every = {id(one): one for one in (tensor.pipeline for tensor in self._plan.tensors) if one is not None}
        found = []
        for pool in pipeline.pools():
            sharing = {key for key, one in every.items() if pool in one.pools()}
            found.append([tensor.name for tensor in self._plan.tensors if id(tensor.pipeline) in sharing])
        return found


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
