"""What a delta says of itself, ``delta.json``: of which base, what each tensor is coded as, and where its blobs lie."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.regular import is_below, once, read_regular
from ktmerge.errors import UsageError

FILE = "delta.json"
BLOBS = "delta.bin"
VERSION = 1
_LARGEST = 1 << 28
"""Bytes of a manifest that is read; one of a million tensors is smaller."""
_FEW, _BYTES_A_VALUE = 1000, 8
"""Values of any manifest; of a long one there are fewer than one in so many bytes, which would fill the memory."""
LARGEST_PIECE = 1 << 25
"""Elements of a piece; those of packed types, which have no places of their own, come whole."""
LARGEST_OTHER = 1 << 26
"""Bytes of a file beside the weights that a delta holds; larger ones are no part of a model."""


@dataclass(frozen=True)
class Piece:
    """Some elements of one tensor, coded.

    Attributes:
        count: of elements.
        coding: ``equal``, ``steps``, ``sparse:N``, ``raw``, ``quantised``, ``low-rank``.
        blobs: first byte and length of each, in the file of blobs.
        parameters: of the coding.
    """

    count: int
    coding: str
    blobs: tuple[tuple[int, int], ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model.

    Attributes:
        file: it lies in.
        dtype: safetensors tag.
        begin: first byte in the file.
        end: the byte after its last.
        base: sha256 of the base's tensor of that name that it is coded against; empty: against nothing.
        sha256: of its bytes after decoding.
        error: norm of what decoding leaves out over the norm of the change; 0 is exact.
        pieces: in order.
    """

    file: str
    dtype: str
    begin: int
    end: int
    base: str
    sha256: str
    error: float
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Other:
    """A file that is no weights: equal to the base's of that name, or stored.

    Attributes:
        size: in bytes.
        sha256: of its bytes.
        blob: first byte and length in the file of blobs; None: it is the base's.
    """

    size: int
    sha256: str
    blob: tuple[int, int] | None


@dataclass(frozen=True)
class Manifest:
    """A whole delta.

    Attributes:
        base: what the base is called, and the digest of its headers.
        exact: whether decoding gives every byte of the model back.
        files: of the weights: size, and the blob of the header with which each begins.
        tensors: by name.
        others: by path.
    """

    base: Mapping[str, str]
    exact: bool
    files: Mapping[str, tuple[int, tuple[int, int]]]
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Other]

    @property
    def size(self) -> int:
        """Bytes of the model that it makes."""
        return sum(size for size, _ in self.files.values()) + sum(other.size for other in self.others.values())

    def to_json(self) -> dict[str, Any]:
        return {"ktmerge_delta": VERSION, **asdict(self)}

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of the delta in ``folder``.

        Raises:
            UsageError: there is none, a newer ktmerge wrote it, or it is broken.
        """
        path = folder / FILE
        try:
            if path.stat().st_size > _LARGEST:
                raise UsageError(f"{path}: is too large to be the manifest of a delta.")
            raw = read_regular(path)
            if raw.count(b",") > _FEW + len(raw) // _BYTES_A_VALUE:
                raise UsageError(f"{path}: holds more values than the manifest of a delta.")
            document = json.loads(raw, object_pairs_hook=once)
        except OSError as error:
            raise UsageError(f"{folder}: is no delta ({FILE}: {error.strerror}).") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{path}: is no JSON, or has a key twice; the delta is broken.") from None
        version = document.get("ktmerge_delta") if isinstance(document, dict) else None
        if not isinstance(version, int):
            raise UsageError(f"{path}: is no manifest of a delta.")
        if version > VERSION:
            raise UsageError(f"{path}: a delta of version {version}, this ktmerge knows {VERSION}; upgrade ktmerge.")
        try:
            return cls(
                base={key: str(value) for key, value in document["base"].items()},
                exact=bool(document["exact"]),
                files={_name(file): (_size(size), _span(blob)) for file, (size, blob) in document["files"].items()},
                tensors={name: _tensor(one) for name, one in document["tensors"].items()},
                others={_name(file): _other(one) for file, one in document["others"].items()},
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UsageError(f"{path}: the manifest is broken: {error}.") from None


def _tensor(one: Mapping[str, Any]) -> Tensor:
    pieces = tuple(
        Piece(int(p["count"]), str(p["coding"]), tuple(_span(b) for b in p["blobs"]), dict(p["parameters"]))
        for p in one["pieces"]
    )
    begin, end = int(one["begin"]), int(one["end"])
    if not 0 <= begin <= end:
        raise ValueError("a tensor ends before it begins")
    dtype, base, sha256 = str(one["dtype"]), str(one["base"]), str(one["sha256"])
    if dtype not in BITS:
        raise ValueError(f"unknown type '{dtype}'")
    if not all(piece.count >= 0 and (piece.count <= LARGEST_PIECE or BITS[dtype] % 8) for piece in pieces):
        raise ValueError(f"a piece has less than no elements, or more than {LARGEST_PIECE}")
    return Tensor(_name(one["file"]), dtype, begin, end, base, sha256, float(one["error"]), pieces)


def _other(one: Mapping[str, Any]) -> Other:
    other = Other(_size(one["size"]), str(one["sha256"]), None if one["blob"] is None else _span(one["blob"]))
    if other.blob is not None and other.size > LARGEST_OTHER:
        raise ValueError(f"a file beside the weights has more than {LARGEST_OTHER} bytes")
    return other


def _size(value: Any) -> int:
    if value < 0:
        raise ValueError("a file has less than no bytes")
    return int(value)


def _span(value: Any) -> tuple[int, int]:
    begin, length = value
    if begin < 0 or length < 0:
        raise ValueError("a blob begins or ends outside its file")
    return int(begin), int(length)


def _name(file: str) -> str:
    """A path below the output, and nowhere else; none that is hidden, as what programs run is (``.git/config``)."""
    os.fsencode(file)  # of half a character, which names no file, this is a ValueError
    if not is_below(file) or "\\" in file:
        raise ValueError(f"'{file}' lies outside of the delta")
    if any(part.startswith(".") for part in Path(file).parts):
        raise ValueError(f"'{file}' is hidden; no file of a model is")
    return file
