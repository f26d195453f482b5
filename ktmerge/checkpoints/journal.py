"""What an unfinished output has already: a line for every finished tensor, so that a killed run can be gone on with.

Knows names and checksums; what the bytes on the disk are worth is for whoever reads them back to say.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.regular import read_regular
from ktmerge.checkpoints.spans import Spans

FILE = ".ktmerge-journal"
_FORMAT = 2
_RISKED, _SHARE = 8 << 20, 64
"""Lines may wait for one another as long as they are of so few bytes, and one in so many, at most."""
_PER_LINE, _PER_BYTE = 2048, 1024
"""Bytes of a line without its pieces; bytes of a tensor for each of which a line has one more (pieces of 50 kB)."""


@dataclass(frozen=True)
class Piece:
    """Bytes ``[start, stop)`` of a tensor as they were written in one go, and their xxh3 of 64 bits."""

    start: int
    stop: int
    checksum: int


@dataclass(frozen=True)
class Entry:
    """A finished tensor."""

    pieces: tuple[Piece, ...]
    report: dict[str, Any]


@dataclass(frozen=True)
class Remains:
    """What a journal says.

    Attributes:
        pin: what the run was: everything its bytes depend on.
        entries: by tensor.
    """

    pin: dict[str, Any]
    entries: Mapping[str, Entry]


class Journal:
    """Written while an output is, in its folder. Lines appear whole; each bears a checksum of its own.

    Lines of many small tensors wait for one another: what is lost with them is done again in no time.

    Args:
        folder: the unfinished output.
        remains: what was finished before, written down again.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, remains: Remains) -> None:
        self._pieces: dict[str, list[Piece]] = {}
        self._waiting: list[bytes] = []
        self._risked = 0
        self._written = 0
        self._lock = threading.Lock()
        path = folder / FILE
        fresh = path.with_name(FILE + "-new")
        lines = [_line({"journal": _FORMAT, "pin": remains.pin})]
        lines += [_entry_line(name, entry) for name, entry in remains.entries.items()]
        fresh.write_bytes(b"".join(lines))
        os.replace(fresh, path)
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_APPEND)

    def wrote(self, name: str, start: int, data: memoryview) -> None:
        """Take note of bytes that were written from byte ``start`` of a tensor on; any thread may."""
        piece = Piece(start, start + len(data), xxhash.xxh3_64_intdigest(data))
        self._pieces.setdefault(name, []).append(piece)

    def finish(self, name: str, nbytes: int, report: dict[str, Any]) -> None:
        """Write down a finished tensor. One that the kernel copied is left out: to copy it again is as quick.

        Raises:
            OSError: the disk is full or fails.
        """
        pieces = self._pieces.pop(name, [])
        spans = Spans()
        for piece in pieces:
            spans.add(piece.start, piece.stop)
        if spans.prefix != nbytes:
            return
        line = _entry_line(name, Entry(tuple(pieces), report))
        with self._lock:
            self._waiting.append(line)
            self._risked += nbytes
            if self._risked >= _RISKED or len(self._waiting) * _SHARE >= self._written:
                self._write()

    def _write(self) -> None:
        if self._descriptor is not None:
            os.write(self._descriptor, b"".join(self._waiting))
        self._written += len(self._waiting)
        self._waiting, self._risked = [], 0

    def close(self) -> None:
        """Write nothing more, after what waits."""
        with self._lock:
            if self._descriptor is None:
                return
            try:
                with suppress(OSError):  # who resumes has less, and no more than that
                    self._write()
            finally:
                descriptor, self._descriptor = self._descriptor, None
                os.close(descriptor)


def journal_room(tensors: Iterable[TensorInfo]) -> int:
    """Bytes that a journal of these tensors may take: a line for each, in it some bytes for each piece."""
    return sum(_PER_LINE + info.nbytes // _PER_BYTE for info in tensors)


def read_journal(folder: Path) -> Remains | None:
    """What a dead run wrote down; None if it kept no journal. Torn or damaged lines are passed over."""
    try:
        first, *rest = read_regular(folder / FILE).split(b"\n")
    except OSError:
        return None
    head = _parsed(first)
    if head is None or head.get("journal") != _FORMAT or not isinstance(head.get("pin"), dict):
        return None
    found = [line for line in map(_parsed, rest) if line is not None]
    entries = {line["name"]: Entry(tuple(Piece(*piece) for piece in line["pieces"]), line["report"]) for line in found}
    return Remains(head["pin"], entries)


def _entry_line(name: str, entry: Entry) -> bytes:
    pieces = [(piece.start, piece.stop, piece.checksum) for piece in entry.pieces]
    return _line({"name": name, "pieces": pieces, "report": entry.report})


def _line(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    return xxhash.xxh3_64_hexdigest(text).encode("ascii") + b" " + text + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if xxhash.xxh3_64_hexdigest(text).encode("ascii") != checksum:
        return None
    document: dict[str, Any] = json.loads(text)
    return document
