"""The changes of one expert in the order of their magnitudes, from which the threshold of any density is read off.

A sweep that turns a density asks for another threshold of the same changes each time. From the second on they are put
in order once; eight bytes an element, in at most a quarter of the machine's memory. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ktmerge.merge.fused import pools
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.kernels.search import Threshold
from ktmerge.merge.merged import memory
from ktmerge.merge.program import Trim

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.kernels.native import Native
    from ktmerge.merge.plan import Plan, TensorPlan
    from ktmerge.merge.pristine import HostReader
    from ktmerge.merge.selection import Thresholds

_SHARE = 4
"""Orders take at most one part in so many of the machine's memory."""
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITE = 0x7F800000
_INDEX = 32
"""Bits of a key below the magnitude: the index of the element in all tensors of the pool."""


class Orders:
    """Of the tensors of one pair of models, by the tensors that a threshold is taken over."""

    def __init__(self, base: HostReader, expert: HostReader, name: str, native: Native) -> None:
        self._base, self._expert, self._name, self._native = base, expert, name, native
        self._room = memory() // _SHARE
        self._asked: dict[tuple[str, ...], str] = {}
        self._held: dict[tuple[str, ...], NDArray[np.uint64] | None] = {}

    def threshold(
        self, of_plan: Pools, prefix: str, tensor: TensorPlan, step: Trim, known: Thresholds
    ) -> Threshold | None:
        """Of the first transform of a tensor; None if it is not known yet, and better found by looking at all.

        Args:
            of_plan: the pools of the tensor's plan.
            prefix: that transform, spelled out.
            tensor: one of them.
            step: its first transform.
            known: thresholds that were found before; one that is read off is added.
        """
        shared = step.scope == "global"
        members, names = of_plan.of(prefix) if shared else ((tensor,), (tensor.name,))
        key = prefix, names if shared else tensor.name
        if key not in known:
            if self._asked.setdefault(names, prefix) == prefix:
                return None
            if names not in self._held:
                self._held[names] = self._ordered(members)
            order = self._held[names]
            if order is None:
                return None
            known[key] = [(self._read_off(order, members, step, of_plan.seed), None)]
        return known[key][0][0]

    def _ordered(self, members: tuple[TensorPlan, ...]) -> NDArray[np.uint64] | None:
        """Magnitude and index of every element, ascending; None if there is no room, or an input is not finite."""
        elements = sum(one.info.numel for one in members)
        if 8 * elements > self._room or elements >= 1 << _INDEX:
            return None
        keys = np.empty(elements, np.uint64)
        start = 0
        for one in members:
            stop = start + one.info.numel
            delta = (
                self._expert.read(one.sources[self._name]).float() - self._base.read(one.name).float()
            ).numpy()  # as the kernels take it: both are fp32 patterns or shorter
            keys[start:stop] = delta.view(np.uint32) & _MAGNITUDE
            start = stop
        if int(keys.max()) >= _INFINITE:
            return None
        keys <<= np.uint64(_INDEX)
        keys |= np.arange(elements, dtype=np.uint64)
        keys.sort()
        self._room -= keys.nbytes
        return keys

    def _read_off(self, order: NDArray[np.uint64], members: tuple[TensorPlan, ...], step: Trim, seed: int) -> Threshold:
        kept, elements = step.counts(order.size)[0], order.size
        if kept <= 0 or kept >= elements:
            return Threshold(0, 0, kept, elements)
        floor = int(order[elements - kept]) >> _INDEX
        if floor == 0 or int(order[elements - kept - 1]) >> _INDEX != floor:
            return Threshold(floor, 0, kept, elements)
        edges = np.array([floor << _INDEX, (floor + 1) << _INDEX], np.uint64)
        first, last = order.searchsorted(edges).tolist()
        hashes = self._hashes(order[first:last], floor, members, step, seed)
        return Threshold(floor, int(np.sort(hashes)[-(kept - (elements - last))]), kept, elements)

    def _hashes(
        self, tied: NDArray[np.uint64], floor: int, members: tuple[TensorPlan, ...], step: Trim, seed: int
    ) -> NDArray[np.uint64]:
        """Of elements that have the same magnitude."""
        places = tied & np.uint64((1 << _INDEX) - 1)
        ends = np.cumsum([one.info.numel for one in members]).astype(np.uint64)
        owners = ends.searchsorted(places, side="right")
        found = np.empty(tied.size, np.uint64)
        for number in np.unique(owners).tolist():
            which = np.flatnonzero(owners == number)
            start = int(ends[number]) - members[number].info.numel
            own = (places[which] - np.uint64(start)).astype(np.uint32)
            patterns, hashes = np.full(own.size, floor, np.uint32), np.empty(own.size, np.uint64)
            key = stream_key(seed, step.purpose, self._name, members[number].key)
            self._native.hash_noted(
                own.ctypes.data, patterns.ctypes.data, own.size, floor, key, 0, hashes.ctypes.data
            )  # fmt: skip
            found[which] = hashes
        return found


class Pools:
    """The tensors of one plan that share thresholds, by the stages up to the trim."""

    def __init__(self, plan: Plan) -> None:
        self.seed, self._plan = plan.recipe.seed, plan

    def of(self, prefix: str) -> tuple[tuple[TensorPlan, ...], tuple[str, ...]]:
        """Those over which a threshold is taken, and their names."""
        return self._found[prefix]

    @cached_property
    def _found(self) -> Mapping[str, tuple[tuple[TensorPlan, ...], tuple[str, ...]]]:
        found = {}
        for (position, prefix), members in pools(self._plan.tensors).items():
            if position == 0:
                own = tuple(tensor for tensor in members if not tensor.is_alias)
                found[prefix] = own, tuple(one.name for one in own)
        return found
