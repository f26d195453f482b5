"""One request to a stranger's server, which can neither keep us waiting for ever nor send without end."""

from __future__ import annotations

import io
import time
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from types import MappingProxyType
from typing import Any

from ktmerge.errors import first_line

_SECONDS = 60
"""Most that is waited for any single answer of the connection."""
_SLOWEST, _PATIENCE = 1000, 60
"""Bytes a second that a server has to send on average, in every so many seconds that it is waited for."""
_MOST_HEADERS = 1 << 20
"""Bytes of all headers of one answer, interim ones included."""

Redirected = Callable[[str, str], None]


class EndlessError(Exception):
    """A server that might never end."""


def opened(
    address: str,
    headers: Mapping[str, str],
    redirected: Redirected,
    *,
    own: Mapping[str, str] = MappingProxyType({}),
    method: str = "GET",
    data: Any = None,
) -> HTTPResponse:
    """The answer to a request, of which the headers have been read.

    Args:
        address: http or https.
        headers: of the request.
        own: more headers, which are for this address and none that it leads to.
        redirected: called before a redirect is followed, with whereto and wherefrom; refuses it by raising.
        method: of the request.
        data: its body.

    Raises:
        EndlessError: the server sends too slowly, or headers without end; likewise when the answer is read.
        URLError: it cannot be reached, or says so.
    """
    request = urllib.request.Request(address, data=data, method=method, headers=dict(headers))
    for name, value in own.items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(_Http, _Https, _Redirects(redirected))
    answer: HTTPResponse = opener.open(request, timeout=_SECONDS)
    return answer


class _Watched(io.RawIOBase):
    """What a server sends, counted, and the time that it was waited for."""

    def __init__(self, inner: io.RawIOBase) -> None:
        self._inner, self._count, self._waited, self._all = inner, 0, 0.0, 0
        self.in_headers = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        try:
            count: int | None = self._inner.readinto(buffer)
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:  # of TLS or of the network; those of files are told otherwise
            raise ConnectionError(first_line(error)) from error
        self._waited += time.monotonic() - began
        self._count += count or 0
        self._all += count or 0
        if self._waited > _PATIENCE:
            if self._count < _SLOWEST * self._waited:
                raise EndlessError(f"sends less than {_SLOWEST} bytes a second")
            self._count, self._waited = 0, 0.0  # what came fast excuses nothing that comes later
        if self.in_headers and self._all > _MOST_HEADERS:
            raise EndlessError("sends headers without end")
        return count

    def close(self) -> None:
        self._inner.close()
        super().close()


class _Answer(HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self._watched = _Watched(self.fp.detach())
        self.fp = io.BufferedReader(self._watched)

    def begin(self) -> None:
        self._watched.in_headers = True
        super().begin()
        self._watched.in_headers = False


class _Plain(HTTPConnection):
    """Looks for an answer also where the server stopped listening before all was sent: it says why."""

    response_class = _Answer
    _is_open = False

    def connect(self) -> None:
        super().connect()
        self._is_open = True

    def request(self, *arguments: Any, **named: Any) -> None:
        try:
            super().request(*arguments, **named)
        except (BrokenPipeError, ConnectionResetError):
            if not self._is_open:
                raise


class _Secure(_Plain, HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_Plain, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_Secure, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, redirected: Redirected) -> None:
        self._redirected = redirected

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self._redirected(newurl, req.full_url)
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        fp.close()  # or all that comes with the redirect would be read, however much that is
        return found
