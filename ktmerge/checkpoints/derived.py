"""Checkpoints that stand for others: most tensors are another checkpoint's bytes, some are made while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.reader import BLOCK, Reader, elements

if TYPE_CHECKING:
    import torch


class Made(Protocol):
    """One tensor that is computed from others; any piece of it gives the bits that the whole would."""

    def fill(self, start: int, target: memoryview) -> None:
        """Fill ``target``, bytes, with the elements from ``start`` on. Any thread may."""


@dataclass(frozen=True, kw_only=True)
class Derived(Checkpoint):
    """A checkpoint whose ``tensors`` are what it shows.

    Attributes:
        below: the folders it is made from beside ``root``.
        opened: opens what it is made from.
    """

    below: tuple[Path, ...] = ()
    opened: Callable[[], DerivedReader] = field(repr=False)

    @property
    def roots(self) -> tuple[Path, ...]:
        return (self.root, *self.below)

    def reader(self) -> Reader:
        return self.opened()


def shown(info: TensorInfo, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> TensorInfo:
    """What the header would say of a tensor that is made in place of ``info``."""
    made = TensorInfo(info.name, dtype or info.dtype, info.shape if shape is None else shape, info.file, 0, 0)
    return TensorInfo(made.name, made.dtype, made.shape, made.file, 0, made.numel * BITS[made.dtype] // 8)


def derive(
    source: Checkpoint, tensors: dict[str, TensorInfo], opened: Callable[[], DerivedReader], **changes: Any
) -> Derived:
    """A checkpoint that is ``source`` but for the tensors it shows."""
    taken = {name: getattr(source, name) for name in Checkpoint.__dataclass_fields__}
    return Derived(**{**taken, "tensors": tensors, "below": source.roots[1:], "opened": opened, **changes})


class DerivedReader:
    """Reads a `Derived`.

    Args:
        tensors: what is shown.
        source: has the tensors that are shown as they are.
        made: the others.
        others: further readers that ``made`` draws from, to be closed with this one.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        source: Reader,
        made: Mapping[str, Made],
        others: Sequence[Reader] = (),
    ) -> None:
        self._tensors = tensors
        self._source = source
        self._made = made
        self._others = others

    def __enter__(self) -> DerivedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for reader in (self._source, *self._others):
            reader.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return elements(self, name, self._tensors[name], start, stop)

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        made = self._made.get(name)
        if made is None:
            self._source.read_into(name, start, target)
        else:
            made.fill(start, target.cast("B"))

    def place(self, name: str) -> tuple[int, int, int] | None:
        return None if name in self._made else self._source.place(name)

    def blocks(self, name: str) -> Iterator[memoryview]:
        if name not in self._made:
            yield from self._source.blocks(name)
            return
        info = self._tensors[name]
        width = BITS[info.dtype] // 8
        buffer = memoryview(bytearray(min(BLOCK, info.nbytes)))
        for start in range(0, info.numel, BLOCK // width):
            piece = buffer[: min(BLOCK, info.nbytes - start * width)]
            self._made[name].fill(start, piece)
            yield piece

    def check_unchanged(self) -> None:
        for reader in (self._source, *self._others):
            reader.check_unchanged()
