"""Reads tensor bytes at known positions, from any thread. Knows nothing about what the numbers mean."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ktmerge.checkpoints.dtypes import BITS, torch_dtype
from ktmerge.checkpoints.header import FileStamp, TensorInfo
from ktmerge.errors import KtmergeError

if TYPE_CHECKING:
    import torch

BLOCK = 8 << 20
"""Bytes read at a time by `TensorReader.blocks`."""
_FILES = 10240
"""Open files at most; some systems refuse more."""


class Reader(Protocol):
    """Where the tensors of one checkpoint come from: its files, or something that stands for them.

    A context manager; every method but ``close`` may be called from any thread.
    """

    def __enter__(self) -> Reader: ...
    def __exit__(self, *_: object) -> None: ...
    def close(self) -> None: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor: ...
    def read_into(self, name: str, start: int, target: memoryview) -> None: ...
    def place(self, name: str) -> tuple[int, int, int] | None:
        """None if the bytes lie in no file as they are."""

    def blocks(self, name: str) -> Iterator[memoryview]: ...
    def check_unchanged(self) -> None: ...


def elements(reader: Reader, name: str, info: TensorInfo, start: int, stop: int | None) -> torch.Tensor:
    """What `Reader.read` gives, by way of `Reader.read_into`."""
    import torch

    dtype = torch_dtype(info.dtype)
    stop = info.numel if stop is None else stop
    if not 0 <= start <= stop <= info.numel:
        raise ValueError(f"elements [{start}, {stop}) of '{name}', which has {info.numel}")
    raw = torch.empty((stop - start) * (BITS[info.dtype] // 8), dtype=torch.uint8)
    if raw.numel():
        reader.read_into(name, start, raw.numpy().data)
    return raw.view(dtype)


@cache
def _allow_many_files() -> None:
    """Have as many files open as shards may need: without asking it is 1024 in most places, and 256 in some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if resource.RLIM_INFINITY != soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class TensorReader:
    """Positional reads from the weight files of one checkpoint; one descriptor a file, safe to share among threads."""

    def __init__(self, root: Path, tensors: Mapping[str, TensorInfo], stamps: Mapping[str, FileStamp]) -> None:
        self._root = root
        self._tensors = tensors
        self._stamps = stamps
        self._same: dict[str, FileStamp] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        _allow_many_files()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened tensor, in its own type, in memory of its own.

        Raises:
            KtmergeError: the file cannot be read, is truncated or was changed, or torch has no such element type.
        """
        return elements(self, name, self._tensors[name], start, stop)

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fill ``target``, bytes, with the elements from ``start`` on, in the tensor's own type; loads no torch.

        Raises:
            KtmergeError: as `read`.
        """
        info = self._tensors[name]
        self._fill(info, target, info.begin + start * (BITS[info.dtype] // 8))

    def place(self, name: str) -> tuple[int, int, int] | None:
        """Descriptor, first and last byte (exclusive) where the tensor lies as it is, for the kernel to copy."""
        info = self._tensors[name]
        return self._descriptor(info.file), info.begin, info.end

    def blocks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor of any type, in pieces of at most `BLOCK`; a piece is valid until the next."""
        info = self._tensors[name]
        buffer = memoryview(bytearray(min(BLOCK, info.nbytes)))
        position = info.begin
        while position < info.end:
            piece = buffer[: min(len(buffer), info.end - position)]
            self._fill(info, piece, position)
            yield piece
            position += len(piece)

    def check_unchanged(self) -> None:
        """Make sure that the files are still the ones whose headers were read.

        Raises:
            KtmergeError: one was changed, replaced or removed.
        """
        for file in self._stamps:
            try:
                status = os.stat(self._root / file)
            except OSError as error:
                raise KtmergeError(f"{self._root / file}: cannot be read any more: {error.strerror}.") from None
            self._compare(file, status)

    def _compare(self, file: str, status: os.stat_result) -> None:
        path, before, stamp = self._root / file, self._stamps[file], FileStamp.of(status)
        if stamp in (before, self._same.get(file)):
            return
        if not stamp.may_have_bytes_of(before):
            raise KtmergeError(f"{path}: was changed while it was in use; start again.")
        from ktmerge.checkpoints.digests import holds_still

        if not holds_still(path, before):
            raise KtmergeError(
                f"{path}: was changed while it was in use, if only its permissions, owner or links: whether its bytes "
                "are the same cannot be told; start again."
            )
        self._same[file] = stamp

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                path = self._root / file
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise KtmergeError(f"{path}: cannot be opened: {error.strerror}.") from None
                try:
                    self._compare(file, os.fstat(descriptor))
                except KtmergeError:
                    os.close(descriptor)
                    raise
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def _fill(self, info: TensorInfo, target: memoryview, position: int) -> None:
        descriptor = self._descriptor(info.file)
        done = 0
        while done < len(target):
            try:
                count = os.preadv(descriptor, [target[done:]], position + done)
            except OSError as error:
                raise KtmergeError(
                    f"{self._root / info.file}: tensor '{info.name}' cannot be read: {error.strerror}."
                ) from None
            if count == 0:
                raise KtmergeError(
                    f"{self._root / info.file}: ends inside tensor '{info.name}'; it was truncated while it was in use."
                )
            done += count
