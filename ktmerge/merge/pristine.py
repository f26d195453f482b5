"""Copies of checkpoints in memory, so that a sweep of blends into a live model reads every weight from disk once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.checkpoints import Checkpoint, Reader, TensorInfo
from ktmerge.checkpoints.dtypes import BITS, torch_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ktmerge.merge.plan import Plan
    from ktmerge.merge.selection import Thresholds

_BLOCK = 8 << 20


class Pristine:
    """Base and experts as they were read; blends read them and never change them.

    What a recipe needs is read when a blend first asks for it, and again if its files have changed since. Thresholds
    are found once: a sweep of lambda goes over every weight once a blend.

    Args:
        device: where the copies lie: cpu, or cuda if a GPU has the room, which saves the way through the bus.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._readers: dict[str, Reader] = {}
        self._thresholds: dict[str, Thresholds] = {}

    def reader(self, plan: Plan, expert: str | None) -> Reader:
        """Of an expert, or of the base."""
        checkpoint = plan.base if expert is None else plan.expert(expert).checkpoint
        key = _identity(plan, expert, checkpoint)
        if key not in self._readers:
            with checkpoint.reader() as files:
                copies = {name: _copy(files, info) for name, info in checkpoint.tensors.items()}
                files.check_unchanged()
            held = HostReader(checkpoint.tensors, copies)
            self._readers[key] = held if self._device == "cpu" else DeviceReader(checkpoint.tensors, held, self._device)
        return self._readers[key]

    def thresholds(self, plan: Plan) -> Thresholds:
        """What trims of these inputs with this seed were found to keep; the finder's to read and to fill."""
        models = [_identity(plan, None, plan.base)]
        models += [_identity(plan, expert.name, expert.checkpoint) for expert in plan.experts]
        names = [expert.name for expert in plan.experts]
        return self._thresholds.setdefault(json.dumps([plan.recipe.seed, names, models]), {})


class HostReader:
    """A `Reader` of tensors in host memory, given as bytes by name."""

    def __init__(self, tensors: Mapping[str, TensorInfo], copies: Mapping[str, NDArray[np.uint8]]) -> None:
        self._tensors = tensors
        self._copies = copies

    def __enter__(self) -> HostReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    copy = np.empty(info.numel * BITS[info.dtype] // 8, np.uint8)
    if copy.size:
        files.read_into(info.name, 0, copy.data)
    return copy


def _identity(plan: Plan, expert: str | None, checkpoint: Checkpoint) -> str:
    """What decides the values that a checkpoint shows: the reference, what the recipe says of it, its files."""
    recipe = plan.recipe
    own: Any = None if expert is None else recipe.experts[expert].model_dump(mode="json", exclude={"weight"})
    output = recipe.output.model_dump(mode="json", exclude={"dtype", "rounding", "not_finite"})
    stamps = {file: str(stamp) for file, stamp in checkpoint.stamps.items()}
    return json.dumps([str(recipe.folder), recipe.base, own, output, stamps, checkpoint.header_digest()])
