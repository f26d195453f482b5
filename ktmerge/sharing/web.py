"""Bundles at an address: looked at piece by piece where the server gives pieces, fetched with retries and resumes."""

from __future__ import annotations

import io
import ipaddress
import os
import socket
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from http.client import HTTPException, HTTPResponse, IncompleteRead, InvalidURL
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from ktmerge.checkpoints.workroom import passing_room, workroom
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import Step
from ktmerge.sharing import contents
from ktmerge.sharing.archive import Archive
from ktmerge.sharing.fetching import Remote, place_for, received
from ktmerge.sharing.opening import EndlessError, Redirected, opened
from ktmerge.sharing.retrying import PASSING, retried
from ktmerge.sharing.source import ArchiveSource

_PIECE = 1 << 16
_NO_HEAD = (403, 405, 501)
"""What servers say that answer no HEAD; addresses that are signed are signed for one method."""


class UrlSource:
    """A bundle's file at an https address.

    Raises:
        UsageError: the address is another kind.
    """

    def __init__(self, address: str) -> None:
        _require_safe(address)
        self._address = address
        self.where = without_query(address)

    @property
    def size(self) -> int | None:
        """Bytes of the file; None if the server does not tell."""
        return self._told[0]

    def sizes(self) -> Mapping[str, int] | None:
        return self._archive.sizes if self._archive is not None else None

    def manifest(self) -> bytes:
        if self._archive is None:
            raise KtmergeError(f"{self.where}: does not show what it holds.")
        return self._archive.read(contents.MANIFEST)

    def blocks(self, name: str) -> Iterator[bytes]:
        raise KtmergeError(f"{self.where}: was not fetched.")

    def fetched(self, folder: Path, step: Step) -> ArchiveSource:
        """The whole file, in a folder of ours, where an earlier process may have left a part of it.

        Raises:
            UsageError: it is larger than was told.
            KtmergeError: it cannot be fetched.
        """
        size, tag = self._told
        path = place_for(folder, *((tag, size) if tag else ())).with_suffix(contents.SUFFIX)
        Remote(self.where, size, tag, lambda headers: _opened(self._address, headers), self._asked).fetch(path, step)
        found = ArchiveSource(path)
        found.where = self.where
        return found

    @cached_property
    def _told(self) -> tuple[int | None, str | None]:
        """Size and strong etag."""

        def ask() -> tuple[int | None, str | None]:
            try:
                with _opened(self._address, method="HEAD") as answer:
                    length, tag = answer.headers.get("Content-Length"), answer.headers.get("ETag")
            except urllib.error.HTTPError as error:
                if error.code in _NO_HEAD:
                    return None, None
                raise
            strong = tag if tag and not tag.startswith("W/") else None
            told = int(length) if length and length.isdecimal() and len(length) < 20 else 0
            return told or None, strong  # those that make their answers as they go say 0

        found: tuple[int | None, str | None] = self._asked(ask)
        return found

    @cached_property
    def _archive(self) -> Archive | None:
        """The archive, of which only the pieces that are looked at are fetched; None if the server gives none."""
        size = self.size
        if size is None or not self._asked(lambda: _gives_pieces(self._address)):
            return None
        stream = io.BufferedReader(_Pieces(self._address, size, self._asked), _PIECE)
        return Archive(stream, size, self.where)

    def _asked(self, call: Callable[[], Any]) -> Any:
        return asked_server(call, self.where)


def put(address: str, write: Callable[[Path], None]) -> None:
    """Send a bundle's file to an address that takes it.

    Args:
        address: https.
        write: makes the file.

    Raises:
        UsageError: the address is of another kind, or the server refuses.
        KtmergeError: it cannot be reached.
    """
    _require_safe(address)
    with workroom(passing_room("put")) as folder:
        archive = folder / f"bundle{contents.SUFFIX}"
        write(archive)

        def send() -> None:
            size = os.stat(archive).st_size
            with archive.open("rb") as data:
                headers = {"Content-Type": "application/zip", "Content-Length": str(size)}
                _opened(address, headers, method="PUT", data=data).close()

        asked_server(send, without_query(address))


class _Pieces(io.RawIOBase):
    """A file at an address, read by ranges."""

    def __init__(self, address: str, size: int, asked: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._address, self._size, self._asked, self._place = address, size, asked, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        span = f"bytes={self._place}-{self._place + wanted - 1}"

        def piece() -> bytes:
            with _opened(self._address, {"Range": span}) as answer:
                if answer.status != 206:
                    raise KtmergeError(f"{without_query(self._address)}: gave pieces before, and now does not.")
                found = b"".join(received(answer, wanted))
            if len(found) < wanted:
                raise IncompleteRead(found, wanted - len(found))
            return found

        buffer[:wanted] = self._asked(piece)
        self._place += wanted
        return wanted


def _opened(address: str, headers: Mapping[str, str] | None = None, **how: Any) -> HTTPResponse:
    return opened_there(address, headers or {}, _require_safe, **how)


def opened_there(
    address: str, headers: Mapping[str, str], redirected: Redirected, *, own: Mapping[str, str] = MappingProxyType({}),
    method: str = "GET", data: Any = None,
) -> HTTPResponse:  # fmt: skip
    """The answer to a request for a file as it is; as `opened`.

    Raises:
        UsageError: the server packs what it sends.
    """
    told = {"User-Agent": "ktmerge", "Accept-Encoding": "identity", **headers}
    answer = opened(address, told, redirected, own=own, method=method, data=data)
    packed = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if packed not in ("", "identity") and data is None:
        answer.close()
        raise UsageError(
            f"{without_query(address)}: the server sends the file packed ({packed[:40]}), though asked for it as it is."
        )
    return answer


def _gives_pieces(address: str) -> bool:
    try:
        with _opened(address, {"Range": "bytes=0-0"}) as answer:
            return bool(answer.status == 206)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return False
        raise


def asked_server(call: Callable[[], Any], where: str) -> Any:
    """What a server answers, asked again while it is busy, and where the connection broke.

    Raises:
        UsageError: it refuses.
        KtmergeError: it cannot be reached, stays busy, or sends without end.
    """
    try:
        return retried(call, where)
    except EndlessError as error:
        raise KtmergeError(f"{where}: {error}; given up.") from None
    except urllib.error.HTTPError as error:
        kind = KtmergeError if error.code in PASSING or error.code >= 500 else UsageError
        reason = str(error.reason).partition("\n")[0][:100].rstrip(".")
        raise kind(f"{where}: the server says {error.code} {reason}.") from None
    except urllib.error.URLError as error:
        raise KtmergeError(f"{where}: cannot be reached: {error.reason}.") from None
    except (InvalidURL, UnicodeError):
        raise UsageError(f"{where}: is no address; write spaces and the like in it as %20.") from None
    except HTTPException as error:
        raise KtmergeError(f"{where}: the server broke off: {type(error).__name__}.") from None
    except (ConnectionError, TimeoutError) as error:
        raise KtmergeError(f"{where}: the connection broke: {error}.") from None
    except ValueError as error:
        raise UsageError(f"{where}: is no address: {error}.") from None


def _require_safe(address: str, redirected_by: str | None = None) -> None:
    """Only https, or plain http on this machine; a redirect from elsewhere may not lead here.

    Raises:
        UsageError: it is another kind.
    """
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError as error:
        raise UsageError(f"{address}: is no address: {error}.") from None
    by = f"{without_query(redirected_by)} leads to " if redirected_by else ""
    local = _is_local(host)
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise UsageError(f"{by}{without_query(address)}: only https is taken; anyone on the way could change the rest.")
    if not host:
        raise UsageError(f"{address}: names no server.")
    if "@" in parts.netloc:
        raise UsageError(f"{by}{without_query(address)}: user and password cannot be sent; leave them out.")
    if redirected_by and _is_inner(host) and not _is_inner(urlsplit(redirected_by).hostname or ""):
        raise UsageError(
            f"{by}{without_query(address)}, which is on this machine or in a network of its own; that is not followed."
        )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_inner(host: str) -> bool:
    """Whether a name stands for an address that is not of the open net: so none can be reached by way of a stranger."""
    try:
        found = {ipaddress.ip_address(told[4][0]) for told in socket.getaddrinfo(host, None)}
    except (OSError, ValueError):
        return False  # it cannot be reached either
    return any(not (getattr(one, "ipv4_mapped", None) or one).is_global for one in found)


def without_query(address: str) -> str:
    """An address as it can be told: what follows ``?`` may be a key, and so may what stands before ``@``."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address.partition("?")[0]
    return parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()
