"""Where blended tensors go: files on disk, or the parameters of a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import tag_of, torch_dtype
from ktmerge.checkpoints.live import Pieces, live_tensors
from ktmerge.checkpoints.reader import Reader
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import UsageError
from ktmerge.merge.report import TensorReport
from ktmerge.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

# Types that hold every value of the key type.
_HOLDS = {"BF16": ("BF16", "F32", "F64"), "F16": ("F16", "F32", "F64"), "F32": ("F32", "F64")}
_SCATTERED = 1 << 20
"""Elements written at a time where they do not lie behind one another."""


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

    Attributes:
        targets: what is written into, by the base's names, without what the model has no room for, or computes itself.

    Raises:
        UsageError: the model has a tensor that the base lacks, or one in another shape, or not in memory as a whole.
    """

    def __init__(self, model: Any, base: Checkpoint) -> None:
        tensors, alignment = live_tensors(model, base)
        places = {piece.data_ptr() for name in alignment.mapping.values() for piece in tensors[name]}
        computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # as Marian's positions are
        extra = [name for name in alignment.extra if name not in computed]
        loose = [name for name in extra if any(piece.data_ptr() not in places for piece in tensors[name])]
        # What the library does not load has no room in the model; a tensor of its own tells another model.
        if loose or alignment.mismatched or alignment.ambiguous or not alignment.mapping:
            alignment.require_complete()
        self.targets: Mapping[str, Pieces] = {name: tensors[found] for name, found in alignment.mapping.items()}
        self._missing, self._told = alignment.missing, False
        for name, target in self.targets.items():
            if any(piece.is_meta for piece in target):
                raise UsageError(f"the model: '{name}' is not in memory (meta device); load it without offloading.")
        self._tags: dict[str, str] = {}
        self._places = {
            name: (tag_of(pieces[0].dtype), pieces[0].data_ptr())
            for name, pieces in self.targets.items()
            if len(pieces) == 1 and pieces[0].device.type == "cpu" and pieces[0].is_contiguous()
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
        devices = {piece.device for pieces in self.targets.values() for piece in pieces}
        return str(devices.pop()) if {device.type for device in devices} == {"cuda"} and len(devices) == 1 else "cpu"

    def tell(self, progress: Progress) -> list[str]:
        """What a person should know of the model; ``progress`` is told once."""
        if not self._missing:
            return []
        more = f" and {len(self._missing) - 1} more" if len(self._missing) > 1 else ""
        note = f"the model has no room for '{self._missing[0]}'{more} of the base's tensors; they are left out of it."
        if not self._told:
            progress.note(note)
        self._told = True
        return [note]

    def dtype(self, name: str, planned: str) -> str:
        target = self.targets.get(name)
        own = planned if target is None else tag_of(target[0].dtype)
        self._tags[name] = planned if own in _HOLDS.get(planned, (planned,)) else own
        return self._tags[name]

    def write(self, name: str, values: Tensor, start: int) -> None:
        end = 0
        for target in self.targets.get(name, ()):  # none: a buffer that the model computes, or has no room for
            begin, end = end, end + target.numel()
            own = values[max(0, begin - start) : max(0, end - start)]
            if own.numel():
                _put(target, own, max(0, start - begin))

    def write_bytes(self, name: str, data: memoryview, start: int) -> None:
        import torch

        if name not in self.targets or not len(data):
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


def _put(target: Tensor, values: Tensor, start: int) -> None:
    """Take elements from ``start`` on, flat, whatever the strides."""
    import torch

    with torch.no_grad():
        if target.is_contiguous():
            target.view(-1)[start : start + values.numel()].copy_(values)
            return
        for begin in range(0, values.numel(), _SCATTERED):
            piece = values[begin : begin + _SCATTERED]
            places = torch.arange(start + begin, start + begin + piece.numel(), device=target.device)
            target[torch.unravel_index(places, target.shape)] = piece.to(target)
