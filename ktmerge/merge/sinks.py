"""Where blended tensors go: files on disk, or the parameters of a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import tag_of, torch_dtype
from ktmerge.checkpoints.live import as_checkpoint
from ktmerge.checkpoints.reader import Reader
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import UsageError
from ktmerge.merge.report import TensorReport

if TYPE_CHECKING:
    from torch import Tensor

# Types that hold every value of the key type.
_HOLDS = {"BF16": ("BF16", "F32", "F64"), "F16": ("F16", "F32", "F64"), "F32": ("F32", "F64")}


class Sink(Protocol):
    """Takes tensors piece by piece, under the base's names, from any number of threads in any order."""

    def dtype(self, name: str, planned: str) -> str:
        """The type to round to, given the one the plan asks for."""

    def write(self, name: str, values: Tensor, start: int) -> None:
        """Take elements from ``start`` on, flat, in that type."""

    def write_bytes(self, name: str, data: memoryview, start: int) -> None:
        """Take bytes of that type, from byte ``start`` on."""

    def copy(self, name: str, reader: Reader, source: str) -> None:
        """Take a whole tensor as it is."""

    def finished(self, name: str) -> dict[str, Any] | None:
        """The report of a tensor that an interrupted run completed and that is there; it need not be made again."""

    def finish(self, name: str, report: TensorReport) -> None:
        """All of a tensor was written or copied; `finished` will say of it what ``report`` says."""


class FileSink:
    """Writes at each tensor's known offset in the planned files."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def dtype(self, name: str, planned: str) -> str:
        return planned

    def write(self, name: str, values: Tensor, start: int) -> None:
        self._writer.write(name, values, start)

    def write_bytes(self, name: str, data: memoryview, start: int) -> None:
        self._writer.write_bytes(name, data, start)

    def copy(self, name: str, reader: Reader, source: str) -> None:
        place = reader.place(source)
        if place is not None and self._writer.copy_range(name, *place):
            return
        start = 0
        for block in reader.blocks(source):
            self._writer.write_bytes(name, block, start)
            start += len(block)

    def finished(self, name: str) -> dict[str, Any] | None:
        return self._writer.finished(name)

    def finish(self, name: str, report: TensorReport) -> None:
        self._writer.finish(name, vars(report))


class LiveSink:
    """Writes into the parameters and buffers of a loaded model, tied ones once.

    Args:
        model: a ``torch.nn.Module`` of the base's architecture; its names are matched like an expert's.
        base: the base's headers.

    Raises:
        UsageError: the model lacks a tensor of the base, has it in another shape, or not in memory as a whole.
    """

    def __init__(self, model: Any, base: Checkpoint) -> None:
        state: dict[str, Tensor] = dict(model.state_dict())
        alignment = align(base, as_checkpoint(state, base), "the model")
        stored = set(alignment.mapping.values())
        places = {tensor.data_ptr() for name, tensor in state.items() if name in stored}
        loose = [name for name in alignment.extra if state[name].data_ptr() not in places]
        if alignment.missing or alignment.mismatched or alignment.ambiguous or loose:
            alignment.require_complete()
        self._targets: Mapping[str, Tensor] = {name: state[found] for name, found in alignment.mapping.items()}
        for name, target in self._targets.items():
            if target.is_meta:
                raise UsageError(f"the model: '{name}' is not in memory (meta device); load it without offloading.")
            if not target.is_contiguous():
                raise UsageError(f"the model: '{name}' is not contiguous in memory; call .contiguous() on it first.")
        self._tags: dict[str, str] = {}
        self._places = {
            name: (tag_of(target.dtype), target.data_ptr())
            for name, target in self._targets.items()
            if target.device.type == "cpu"
        }
        self._owners = [
            (registry, name, values, values.data_ptr())
            for module in model.modules()
            for registry in (module._parameters, module._buffers)
            for name, values in registry.items()
            if values is not None
        ]

    def is_current(self) -> bool:
        """Whether all of the model's tensors are where they were."""
        return all(
            registry.get(name) is values and values.data_ptr() == place
            for registry, name, values, place in self._owners
        )

    def place(self, name: str) -> tuple[str, int] | None:
        """Type and address of a tensor in this process's memory; None if it is not there."""
        return self._places.get(name)

    @property
    def device(self) -> str:
        """The CUDA device that all of it lies on, else ``cpu``: where blending into it takes the fewest copies."""
        places = {str(target.device) for target in self._targets.values() if target.device.type == "cuda"}
        return places.pop() if len(places) == 1 and not self._places else "cpu"

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """What is written into, by the base's names; buffers that the model computes itself are in none."""
        return self._targets

    def dtype(self, name: str, planned: str) -> str:
        target = self._targets.get(name)
        own = planned if target is None else tag_of(target.dtype)
        self._tags[name] = planned if own in _HOLDS.get(planned, (planned,)) else own
        return self._tags[name]

    def write(self, name: str, values: Tensor, start: int) -> None:
        import torch

        target = self._targets.get(name)
        if target is None:
            return  # a buffer that the model computes itself
        with torch.no_grad():
            target.view(-1)[start : start + values.numel()].copy_(values)

    def write_bytes(self, name: str, data: memoryview, start: int) -> None:
        import torch

        target = self._targets.get(name)
        if target is None or not len(data):
            return
        dtype = torch_dtype(self._tags[name])
        values = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8).view(dtype)
        self.write(name, values, start // dtype.itemsize)

    def copy(self, name: str, reader: Reader, source: str) -> None:
        self.write(name, reader.read(source), 0)

    def finished(self, name: str) -> dict[str, Any] | None:
        return None

    def finish(self, name: str, report: TensorReport) -> None:
        pass
