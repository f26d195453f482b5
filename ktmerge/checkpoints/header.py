"""The header of one safetensors file: read with distrust, written as the reference library would accept it.

Knows names, types, shapes and byte ranges; knows nothing about the bytes themselves or about models.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ktmerge.checkpoints.dtypes import BITS, FLOATS
from ktmerge.checkpoints.regular import once, open_regular
from ktmerge.errors import UsageError, did_you_mean

MAX_HEADER = 100_000_000
"""Bytes; the reference library's limit."""
MAX_RANK = 64
MAX_DIMENSION = 2**63 - 1


class TensorSpec(Protocol):
    """What has to be known of a tensor to write it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it; ``begin`` and ``end`` are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    @property
    def is_float(self) -> bool:
        """Whether the elements are plain floating-point numbers."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class FileStamp:
    """What tells that a file was changed or replaced.

    The time of its last change in any way (ctime) cannot be set: a copy that keeps times may get all else of the file
    it replaces.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Take the stamp from a stat result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def may_have_bytes_of(self, other: FileStamp) -> bool:
        """Whether nothing but the ctime differs, as after ``chmod`` or ``ln``; or after a copy that keeps times."""
        return replace(self, ctime_ns=other.ctime_ns) == other


@dataclass(frozen=True)
class Header:
    """The header of one file; tensors by position."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    stamp: FileStamp


class _MalformedError(Exception):
    """Carries the reason up to where the file's name is known."""


def read_header(path: Path, file: str) -> Header:
    """Read and check the header of the safetensors file ``path``, called ``file`` in messages and in the result.

    Raises:
        UsageError: the file is unreadable or malformed in any way; file and tensor are named.
    """
    try:
        with open_regular(path) as stream:
            stamp = FileStamp.of(os.fstat(stream.fileno()))
            prefix = stream.read(8)
            length = _header_length(prefix, stamp.size)
            text = stream.read(length)
        if len(text) != length:
            raise _MalformedError("it ends inside its header")
        entries, metadata = _entries(text)
        tensors = _tensors(entries, file, 8 + length, stamp.size)
    except _MalformedError as reason:
        end = "" if str(reason).endswith("?") else "."
        raise UsageError(f"{path}: not a valid safetensors file: {reason}{end}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    return Header(tensors, metadata, stamp)


def _header_length(prefix: bytes, size: int) -> int:
    if prefix == b"version ":
        raise _MalformedError(
            "it is a git-lfs pointer, the weights were not downloaded; run `git lfs pull` in its folder"
        )
    if len(prefix) < 8:
        raise _MalformedError(f"it has {size} bytes, fewer than the 8 that give the header's length")
    length = int.from_bytes(prefix, "little")
    if length + 8 > size:
        _refuse_other_formats(prefix)
    if length > MAX_HEADER:
        raise _MalformedError(f"its header claims {length} bytes, more than the {MAX_HEADER} allowed")
    if 8 + length > size:
        raise _MalformedError(
            f"its header claims {length} bytes, but the file has only {size}; the copy may be truncated"
        )
    return length


def _refuse_other_formats(prefix: bytes) -> None:
    if prefix.lstrip().startswith(b"<") and b"\0" not in prefix:
        raise _MalformedError("it is a web page, not weights; download it again")
    if prefix.startswith(b"PK\x03\x04"):
        raise _MalformedError(
            "it is a zip archive, perhaps a pickle of torch under another name; convert it where you trust it"
        )


def _entries(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError:
        raise _MalformedError("its header is not UTF-8") from None
    except RecursionError:
        raise _MalformedError("its header is nested too deeply") from None
    except ValueError as error:
        raise _MalformedError(f"its header is not JSON ({error})") from None
    if not isinstance(document, dict) or not text.startswith(b"{"):
        raise _MalformedError("its header is not a JSON object")
    for name in document:
        if not name.isprintable():  # control characters could write to a terminal, half characters to no file
            raise _MalformedError(f"the tensor name {name!r} is not plain text")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _MalformedError("its __metadata__ is not a map of strings to strings")
    return document, metadata


def _tensors(entries: dict[str, Any], file: str, start: int, size: int) -> tuple[TensorInfo, ...]:
    tensors = sorted(
        (_tensor(name, entry, file, start, size) for name, entry in entries.items()),
        key=lambda info: (info.begin, info.end),
    )
    position = start
    for info in tensors:
        if info.begin != position:
            trouble = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise _MalformedError(
                f"tensor '{info.name}' {trouble} (byte {info.begin - start}, expected {position - start})"
            )
        position = info.end
    if position != size:
        raise _MalformedError(f"{size - position} bytes at its end belong to no tensor")
    return tuple(tensors)


def _tensor(name: str, entry: Any, file: str, start: int, size: int) -> TensorInfo:
    def wrong(reason: str) -> NoReturn:
        raise _MalformedError(f"tensor '{name}' {reason}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        wrong("is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        wrong(f"has the unknown type {dtype!r}.{did_you_mean(str(dtype), BITS)}".rstrip("."))
    if not _naturals(shape) or len(shape) > MAX_RANK:
        wrong("has a shape that is not a list of at most 64 whole numbers from 0 to 2^63 - 1")
    if not _naturals(offsets) or len(offsets) != 2:
        wrong("has data_offsets that are not two whole numbers")
    begin, end = offsets
    if begin > end:
        wrong(f"ends (byte {end}) before it begins (byte {begin})")
    if start + end > size:
        wrong(f"reaches to byte {end} of the data, but the file has only {size - start}; the copy may be truncated")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        wrong(f"has shape {list(shape)} of {dtype}, which takes {bits / 8:.15g} bytes, but {end - begin} are given")
    return TensorInfo(name, dtype, tuple(shape), file, start + begin, start + end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_DIMENSION for item in value)


@dataclass(frozen=True)
class FilePlan:
    """One weight file to be written: its name relative to the checkpoint, its tensors in order, its metadata.

    The names of its tensors begin with ``prefix``, which the file itself leaves out.
    """

    file: str
    tensors: Sequence[TensorSpec]
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""


def build_header(plan: FilePlan) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The bytes of a safetensors header (length prefix included) and where each tensor lies in the file.

    The data begins at a multiple of 8. Tensors keep the order of the plan unless that would put one off its natural
    alignment, where torch cannot view it; then wider types come first, as the reference library orders them.

    Raises:
        UsageError: a name stands twice, or a type or shape cannot be stored.
    """
    ordered = _aligned(plan.tensors, plan.file)
    described: dict[str, Any] = {"__metadata__": dict(plan.metadata)} if plan.metadata else {}
    spans: list[tuple[TensorSpec, int, int]] = []
    position = 0
    for spec in ordered:
        name = spec.name.removeprefix(plan.prefix)
        if name in described or name == "__metadata__":
            raise UsageError(f"{plan.file}: tensor '{spec.name}' is planned twice, or its name is reserved.")
        end = position + _nbytes(spec, plan.file)
        described[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        spans.append((spec, position, end))
        position = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise UsageError(f"{plan.file}: {len(ordered)} tensors need a header of {len(text)} bytes, too long to store.")
    start = 8 + len(text)
    placed = tuple(TensorInfo(s.name, s.dtype, tuple(s.shape), plan.file, start + b, start + e) for s, b, e in spans)
    return len(text).to_bytes(8, "little") + text, placed


def _nbytes(spec: TensorSpec, file: str) -> int:
    if spec.dtype not in BITS:
        raise UsageError(f"{file}: tensor '{spec.name}' has the unknown type {spec.dtype}.")
    bits = math.prod(spec.shape) * BITS[spec.dtype]
    if bits % 8:
        raise UsageError(f"{file}: tensor '{spec.name}' of {spec.dtype} {list(spec.shape)} fills no whole bytes.")
    return bits // 8


def _aligned(tensors: Iterable[TensorSpec], file: str) -> list[TensorSpec]:
    ordered = list(tensors)
    position = 0
    for spec in ordered:
        if position % max(1, BITS.get(spec.dtype, 8) // 8):
            return sorted(ordered, key=lambda spec: -BITS.get(spec.dtype, 8))
        position += _nbytes(spec, file)
    return ordered
