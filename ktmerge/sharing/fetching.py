"""One file from a server to here, gone on with where an earlier attempt stopped, or an earlier process was killed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.errors import UsageError
from ktmerge.progress import Step

PREFIX = "fetched-"
"""How everything begins that is fetched into a folder."""
_PARTIAL = ".partial"
_BLOCK = 1 << 20
_MOST_UNTOLD = 1 << 30
"""Bytes that are read of a file whose size the server does not tell."""


@dataclass(frozen=True)
class Remote:
    """A file on a server.

    Attributes:
        where: it is called in messages.
        size: in bytes; None: the server does not tell.
        tag: strong, by which the server tells whether it is the same file still; None: there is none.
        ask: gives the answer to a request with more headers.
        again: makes a call several times, as long as there is use in it.
    """

    where: str
    size: int | None
    tag: str | None
    ask: Callable[[Mapping[str, str]], HTTPResponse]
    again: Callable[[Callable[[], None]], None]

    def fetch(self, target: Path, step: Step) -> None:
        """Bring it here; nothing is done if it is here.

        Args:
            target: in a folder of ours; beside it lies what there is of it so far, which may be an earlier process's.
            step: told of every byte that is here.

        Raises:
            UsageError: it is larger than was told, or the server refuses.
            KtmergeError: it cannot be fetched.
        """
        if target.exists():
            step.advance(target.stat().st_size)
            return
        partial = target.with_name(f"{target.name}{_PARTIAL}")
        with clear_os_errors(partial):
            partial.touch()
            told = _Told(step)
            self.again(lambda: self._go_on(partial, told))
            partial.replace(target)

    def _go_on(self, partial: Path, told: _Told) -> None:
        start = partial.stat().st_size
        if self.size is not None and start == self.size:
            told.here(start)
            return
        asked = {"Range": f"bytes={start}-", **({"If-Range": self.tag} if self.tag else {})} if start else {}
        try:
            answer = self.ask(asked)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not start:
                raise
            os.truncate(partial, 0)  # the file is another now, and ends before: what was fetched is of no use
            raise IncompleteRead(b"") from None
        with answer:
            if start and answer.status == 206 and not _begins_at(answer, start):
                os.truncate(partial, 0)
                raise IncompleteRead(b"")
            self._write(answer, partial, start if answer.status == 206 else 0, told)

    def _write(self, answer: HTTPResponse, partial: Path, start: int, told: _Told) -> None:
        count = start
        with partial.open("r+b") as target:
            target.truncate(start)
            target.seek(start)
            for block in received(answer):
                count += len(block)
                if count > (_MOST_UNTOLD if self.size is None else self.size):
                    target.truncate(0)
                    raise UsageError(f"{self.where}: is larger than its server told; nothing was unpacked.")
                target.write(block)
                told.here(count)
        if self.size is not None and count < self.size:
            raise IncompleteRead(b"", self.size - count)


class _Told:
    """What a step was told of; nothing twice, however often a download begins again."""

    def __init__(self, step: Step) -> None:
        self._step, self._count = step, 0

    def here(self, count: int) -> None:
        """So many bytes are here."""
        self._step.advance(max(0, count - self._count))
        self._count = max(self._count, count)


def received(answer: HTTPResponse, most: int = sys.maxsize) -> Iterator[bytes]:
    """What a server sends, to its end or so many bytes.

    Raises:
        IncompleteRead: the connection ended before the answer did.
    """
    count = 0
    while count < most and (block := answer.read1(min(_BLOCK, most - count))):
        count += len(block)
        yield block
    if count < most and answer.length:  # Python takes the end of the connection for that of the answer
        raise IncompleteRead(b"", answer.length)


def place_for(folder: Path, *told: object) -> Path:
    """Where in a folder of ours something is fetched to, by all that tells it from others, of which what is there goes.

    Without anything that tells, it is a place that no other process finds.
    """
    key = hashlib.sha256(repr(told or (os.getpid(), os.urandom(8))).encode()).hexdigest()[:16]
    place = folder / f"{PREFIX}{key}"
    for other in folder.glob(f"{PREFIX}*"):
        if not other.name.startswith(place.name):
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    return place


def bytes_in(folder: Path) -> int:
    """Of all that was fetched into a folder."""
    found = [path for top in folder.glob(f"{PREFIX}*") for path in (top, *top.rglob("*"))]
    return sum(path.stat().st_size for path in found if path.is_file())


def _begins_at(answer: HTTPResponse, start: int) -> bool:
    """Whether a part of a file is the one that was asked for; servers that do not say are believed."""
    told = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", f"bytes {start}-"))
    return told is not None and int(told[1]) == start
