"""Copies of checkpoints in memory, so that a sweep of blends into a live model reads every weight from disk once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import BITS, torch_dtype
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.reader import Reader
from ktmerge.merge.merged import MergedDeltas, MergedDeltasOfPlan
from ktmerge.merge.multi_tensor import MultiTensor
from ktmerge.merge.record import said_of_inputs
from ktmerge.merge.replanning import Planner

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ktmerge.merge.kernels.native import Native
    from ktmerge.merge.plan import Plan
    from ktmerge.merge.selection import Thresholds
    from ktmerge.merge.sinks import LiveSink
    from ktmerge.recipes.schema import Recipe

_BLOCK = 8 << 20
_LINE = 64


class Pristine:
    """Base and experts as they were read; blends read them and never change them.

    What a recipe needs is read when a blend first asks for it, and again if its files have changed since. Thresholds
    are found once: a sweep of lambda goes over every weight once a blend.

    Args:
        device: where the copies lie: cpu, or cuda, which saves the way through the bus; there only what leaves half of
            the free memory, the rest in the host's.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._readers: dict[str, HostReader] = {}
        self._thresholds: dict[str, Thresholds] = {}
        self._merged = MergedDeltas()
        self._planner = Planner()
        self._names: dict[int, tuple[Checkpoint, str]] = {}
        self._sinks: WeakKeyDictionary[Any, tuple[Checkpoint, LiveSink]] = WeakKeyDictionary()
        self._multi_tensors: WeakKeyDictionary[LiveSink, tuple[list[Checkpoint], MultiTensor]] = WeakKeyDictionary()

    def plan(self, recipe: Recipe) -> Plan:
        """The recipe's plan; the headers of models that were planned with before are not read again."""
        return self._planner.plan(recipe)

    def reader(self, plan: Plan, expert: str | None) -> HostReader:
        """Of an expert, or of the base."""
        checkpoint = plan.base if expert is None else plan.expert(expert).checkpoint
        key = self._identity(plan, expert, checkpoint)
        if key not in self._readers:
            with checkpoint.reader() as files:
                copies = {name: _copy(files, info) for name, info in checkpoint.tensors.items()}
                files.check_unchanged()
            held = HostReader(checkpoint.tensors, copies)
            placed = self._has_room(checkpoint.nbytes)
            self._readers[key] = DeviceReader(checkpoint.tensors, held, self.device) if placed else held
        return self._readers[key]

    def _has_room(self, size: int) -> bool:
        """Whether so much and as much again is free on the device."""
        if self.device == "cpu":
            return False
        import torch

        return bool(2 * size <= torch.cuda.mem_get_info(self.device)[0])

    def thresholds(self, plan: Plan) -> Thresholds:
        """What trims of these inputs with this seed were found to keep; the finder's to read and to fill."""
        return self._thresholds.setdefault(json.dumps([plan.recipe.seed, self._models(plan)]), {})

    def merged(self, plan: Plan) -> MergedDeltasOfPlan:
        """Merged deltas that blends left, and are to leave."""
        return MergedDeltasOfPlan(self._merged, plan, self._models(plan))

    def sink(self, model: Any, base: Checkpoint) -> LiveSink:
        """The way into a model: the last one, as long as the model's tensors are where they were."""
        from ktmerge.merge.sinks import LiveSink

        known = self._sinks.get(model)
        if known is None or known[0] is not base or not known[1].is_current():
            known = self._sinks[model] = base, LiveSink(model, base)
        return known[1]

    def multi_tensor(self, plan: Plan, sink: LiveSink, native: Native) -> MultiTensor | None:
        """All tensors in one call, for plans like this one into this model; None with copies on a device."""
        if self.device != "cpu":
            return None
        models = [plan.base, *(expert.checkpoint for expert in plan.experts)]
        known = self._multi_tensors.get(sink)
        if known is None or any(one is not other for one, other in zip_longest(known[0], models)):
            experts = [self.reader(plan, expert.name) for expert in plan.experts]
            way = MultiTensor(plan, self.reader(plan, None), experts, sink, native)
            known = self._multi_tensors[sink] = models, way
        return known[1]

    def _models(self, plan: Plan) -> str:
        """What decides the values of base and experts."""
        models = [self._identity(plan, None, plan.base)]
        models += [self._identity(plan, expert.name, expert.checkpoint) for expert in plan.experts]
        return json.dumps([[expert.name for expert in plan.experts], models])

    def _identity(self, plan: Plan, expert: str | None, checkpoint: Checkpoint) -> str:
        """What decides the values that a checkpoint shows: the reference, what the recipe says of it, its files."""
        known = self._names.get(id(checkpoint))
        if known is not None and known[0] is checkpoint:
            return known[1]  # plans of the same models share it
        recipe = plan.recipe
        experts, output = said_of_inputs(recipe)
        own = None if expert is None else [recipe.experts[expert].model, experts[expert]]
        stamps = {file: str(stamp) for file, stamp in checkpoint.stamps.items()}
        told = json.dumps([str(recipe.folder), recipe.base, own, output, stamps, checkpoint.header_digest()])
        self._names[id(checkpoint)] = checkpoint, told
        return told


class HostReader:
    """A `Reader` of tensors in host memory, given as bytes by name."""

    def __init__(self, tensors: Mapping[str, TensorInfo], copies: Mapping[str, NDArray[np.uint8]]) -> None:
        self._tensors = tensors
        self._copies = copies
        self._addresses = {name: copy.ctypes.data for name, copy in copies.items()}

    def __enter__(self) -> HostReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        """Nothing is open."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `TensorReader.read`, but a view of what is held: not to be written to."""
        import torch

        dtype = torch_dtype(self._tensors[name].dtype)
        if not self._copies[name].size:
            return torch.empty(0, dtype=dtype)
        return torch.from_numpy(self._copies[name]).view(dtype)[start:stop]

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        begin = start * BITS[self._tensors[name].dtype] // 8
        np.frombuffer(target, np.uint8)[:] = self._copies[name][begin : begin + len(target)]

    def place(self, name: str) -> tuple[int, int, int] | None:
        return None

    def address(self, name: str) -> int:
        """Of the first byte of a tensor, which is aligned for its type."""
        return self._addresses[name]

    def blocks(self, name: str) -> Iterator[memoryview]:
        data = self._copies[name].data
        for start in range(0, len(data), _BLOCK):
            yield data[start : start + _BLOCK]

    def check_unchanged(self) -> None:
        """Nobody else can change it."""


class DeviceReader(HostReader):
    """The same with the elements on a device, for what is computed there; bytes are still asked of the host's copy."""

    def __init__(self, tensors: Mapping[str, TensorInfo], host: HostReader, device: str) -> None:
        super().__init__(tensors, host._copies)
        self._placed = {name: host.read(name).to(device) for name in tensors}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._placed[name][start:stop]


def _copy(files: Reader, info: TensorInfo) -> NDArray[np.uint8]:
    size = info.numel * BITS[info.dtype] // 8
    room = np.empty(size + _LINE, np.uint8)
    begin = -room.ctypes.data % _LINE
    copy = room[begin : begin + size]
    if copy.size:
        files.read_into(info.name, 0, copy.data)
    return copy
