"""Bundles at an address, from servers that give pieces, give none, break off, lie, or lead elsewhere."""

from __future__ import annotations

import io
import os
import re
import socketserver
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hub_server import served

from ktmerge import api
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.sharing.opening import _Watched
from ktmerge.sharing.web import _require_safe, put

Serve = Callable[..., str]


class Files(BaseHTTPRequestHandler):
    """One file, under any name."""

    raw: bytes
    seen: list[tuple[str, str | None]]
    pieces = True
    tells = True
    heads = True
    location: str | None = None
    statuses: list[int]
    cuts: list[int]
    sent: list[bytes]

    def do_HEAD(self) -> None:
        self.do_GET() if self.heads else self.answer(405, b"", {})

    def do_PUT(self) -> None:
        self.sent.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(self.statuses.pop(0) if self.statuses else 201, b"", {"Retry-After": "0"})

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.seen.append((self.command, asked))
        if self.location is not None:
            self.answer(302, b"", {"Location": self.location})
        elif self.statuses:
            self.answer(self.statuses.pop(0), b"", {"Retry-After": "0"})
        else:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "") if self.pieces else None
            if match is None:
                self.answer(200, self.raw, {"ETag": '"one"'})
                return
            start, stop = int(match[1]), int(match[2]) + 1 if match[2] else len(self.raw)
            self.answer(206, self.raw[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(self.raw)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.tells:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            whole = self.cuts and len(body) > 1000
            self.wfile.write(body[: self.cuts.pop(0)] if whole else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A server of the bundle; ``serve(pieces=False, ...)`` gives the address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("ktmerge.sharing.retrying._FIRST", 0.01)
    with ExitStack() as stack:

        def start(**how: Any) -> str:
            settings = {
                "raw": (place / "r.ktr").read_bytes(),
                "seen": [],
                "statuses": [],
                "cuts": [],
                "sent": [],
                **how,
            }
            return stack.enter_context(served(Files, **settings)) + "/some/r.ktr"

        yield start


def test_only_pieces_are_fetched_before_it_was_shown(place: Path, serve: Serve) -> None:
    seen: list[tuple[str, str | None]] = []
    address = serve(seen=seen)
    offer = api.look(address)
    assert all(asked is not None for method, asked in seen if method == "GET")
    assert offer.manifest is not None
    assert offer.manifest.name == "half-of-spam"
    api.unpack(offer, "out")
    assert Path("out/recipe.yaml").is_file()


@pytest.mark.parametrize(
    "how",
    [
        {"pieces": False},
        {"tells": False},
        {"heads": False},
        {"statuses": [503, 429]},
        {"pieces": False, "tells": False},
    ],
)
def test_servers_that_can_less(place: Path, serve: Serve, how: dict[str, Any]) -> None:
    offer = api.look(serve(**how))
    assert offer.pairs()["to fetch"]
    api.unpack(offer, "out")
    assert Path("out/recipe.yaml").is_file()
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith(".")) == []


def test_nothing_is_fetched_unless_agreed_to(place: Path, serve: Serve, ktmerge: Any, capsys: Any) -> None:
    seen: list[tuple[str, str | None]] = []
    address = serve(seen=seen, pieces=False)
    assert ktmerge("recipe", "pull", address) == 2
    assert [method for method, asked in seen if asked is None] == ["HEAD"]
    assert "cannot be told before it is fetched" in capsys.readouterr().out
    assert ktmerge("recipe", "pull", address, "--yes", "--out", "out") == 0


def test_a_broken_download_goes_on(place: Path, serve: Serve) -> None:
    seen: list[tuple[str, str | None]] = []
    offer = api.look(serve(seen=seen))
    seen.clear()
    address = serve(seen=seen, cuts=[1000, 500])
    offer.source._address = address  # type: ignore[attr-defined]
    api.unpack(offer, "out")
    assert [asked for method, asked in seen] == [None, "bytes=1000-", "bytes=1500-"]
    assert Path("out/recipe.yaml").is_file()


def test_what_is_not_what_was_shown(place: Path, serve: Serve) -> None:
    offer = api.look(serve())
    api.pack("recipe.yaml", "other.ktr", overrides=["blend.lambda=0.25"])
    offer.source._address = serve(raw=Path("other.ktr").read_bytes())  # type: ignore[attr-defined]
    with pytest.raises(UsageError):
        api.unpack(offer, "out")
    assert not Path("out").exists()


def test_refusals(place: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="the server says 404"):
        api.look(serve(statuses=[404]))
    with pytest.raises(KtmergeError, match="the server says 503"):
        api.look(serve(statuses=[503] * 9))
    for location in ("http://example.org/r.ktr", "file:///etc/passwd", "ftp://example.org/x"):
        with pytest.raises(UsageError, match=r"only https is taken|is not allowed"):
            api.look(serve(location=location))
    with pytest.raises(UsageError, match="is no bundle"):
        api.look(serve(raw=b"<html>" * 1000))
    with pytest.raises(KtmergeError, match="cannot be reached"):
        api.look("http://127.0.0.1:9/r.ktr")
    with pytest.raises(UsageError, match="is no address"):
        api.look("https://[::1/r.ktr")
    monkeypatch.setattr("ktmerge.sharing.fetching._MOST_UNTOLD", 1000)
    with pytest.raises(UsageError, match="larger than its server told"):
        api.unpack(api.look(serve(tells=False, pieces=False)), "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "[::ffff:192.168.0.1]", "[fd00::1]", "2130706433"])
def test_no_redirect_leads_into_a_network_of_its_own(address: str) -> None:
    with pytest.raises(UsageError, match="that is not followed"):
        _require_safe(f"https://{address}/r.ktr", "https://93.184.216.34/r.ktr")
    _require_safe("https://93.184.216.35/r.ktr", "https://93.184.216.34/r.ktr")


def test_a_server_that_might_never_end(place: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = api.look(serve(pieces=False))
    monkeypatch.setattr("ktmerge.sharing.opening._SLOWEST", 1 << 40)
    monkeypatch.setattr("ktmerge.sharing.opening._PATIENCE", 0)
    with pytest.raises(KtmergeError, match=r"r\.ktr: sends less than \d+ bytes a second; given up"):
        api.unpack(offer, "out")
    assert sorted(path.name for path in Path().iterdir() if "out" in path.name) == []


class Dripping(socketserver.BaseRequestHandler):
    """Sends its answer in so many small parts, without end."""

    first: bytes
    part: bytes
    pause: float

    def handle(self) -> None:
        self.request.recv(65536)
        with suppress(OSError):
            self.request.sendall(self.first)
            while not time.sleep(self.pause):
                self.request.sendall(self.part)


@pytest.mark.parametrize(
    ("first", "part", "pause", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"a", 0.01, "sends less than"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0", 0.01, "sends less than"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, 0, "headers without end"),
        (b"", b"HTTP/1.1 200 OK\r\n", 0, "broke off"),
    ],
    ids=["header", "chunk", "continue", "lines"],
)
def test_answers_that_never_come_to_an_end(
    place: Path, monkeypatch: pytest.MonkeyPatch, first: bytes, part: bytes, pause: float, words: str
) -> None:
    monkeypatch.setattr("ktmerge.sharing.opening._PATIENCE", 0.2)
    monkeypatch.setattr("ktmerge.sharing.retrying._FIRST", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(Dripping, first=first, part=part, pause=pause) as address, pytest.raises(KtmergeError, match=words):
        api.unpack(api.look(f"{address}/r.ktr"), "out")
    assert not Path("out").exists()


def test_what_comes_with_a_redirect_is_not_read(place: Path, serve: Serve) -> None:
    target = serve()
    first = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode()
    with served(Dripping, first=first, part=b"x" * 1_000_000, pause=0) as address:
        api.unpack(f"{address}/r.ktr", "out")
    assert Path("out/recipe.yaml").is_file()


def test_redirects_in_a_circle(place: Path, serve: Serve) -> None:
    seen: list[tuple[str, str | None]] = []
    with pytest.raises(UsageError, match="the server says 302"):
        api.look(serve(seen=seen, location="/again"))
    assert len(seen) < 20


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000])
def test_a_length_that_is_no_number(place: Path, serve: Serve, length: str) -> None:
    class Odd(Files):
        def send_header(self, keyword: str, value: str) -> None:
            super().send_header(keyword, length if keyword == "Content-Length" else value)

    with served(Odd, raw=Path("r.ktr").read_bytes(), seen=[], statuses=[], cuts=[], sent=[]) as address:
        assert api.look(f"{address}/r.ktr").size is None


def test_keys_in_addresses_are_not_told(place: Path, serve: Serve) -> None:
    address = serve() + "?X-Signature=secret"
    offer = api.look(address)
    assert "secret" not in str(offer.pairs())
    with pytest.raises(KtmergeError) as caught:
        api.look(serve(statuses=[404] * 9) + "?key=secret")
    assert "secret" not in str(caught.value)
    for changed in (address.replace("http://", "http://me:secret@"), address.replace("/r.ktr", "/my r.ktr")):
        with pytest.raises(UsageError, match=r"user and password|as %20") as caught:
            api.look(changed)
        assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="is no address"):
        api.push("r.ktr", "https://[::1/r.ktr?key=secret")
    pushed = api.push("r.ktr", serve(sent=[]) + "?X-Signature=secret")
    assert "secret" not in str(pushed.to_json())


def test_a_pause_that_is_no_number(place: Path, serve: Serve) -> None:
    class Odd(Files):
        def send_header(self, keyword: str, value: str) -> None:
            super().send_header(keyword, "\xb2" if keyword == "Retry-After" else value)

    raw = Path("r.ktr").read_bytes()
    with served(Odd, raw=raw, seen=[], statuses=[503], cuts=[], sent=[]) as address:
        assert api.look(f"{address}/r.ktr").manifest is not None


def test_a_push_to_an_address(place: Path, serve: Serve) -> None:
    sent: list[bytes] = []
    address = serve(sent=sent, statuses=[503])
    api.push("r.ktr", address)
    assert sent == [(place / "r.ktr").read_bytes()] * 2
    with pytest.raises(UsageError, match="the server says 403"):
        api.push("r.ktr", serve(statuses=[403]))


def test_an_answer_that_ends_early_is_not_taken_for_whole(place: Path, serve: Serve) -> None:
    """Where nothing told the size before, the answer itself does."""
    how = {"heads": False, "pieces": False}
    assert api.unpack(serve(**how, cuts=[1000]), "out").out.is_dir()
    with pytest.raises(KtmergeError, match="the server broke off") as caught:
        api.unpack(serve(**how, cuts=[1000] * 9), "more")
    assert caught.value.exit_code == 1
    assert not Path("more").exists()


def test_pieces_that_end_early_are_asked_for_again(place: Path, serve: Serve) -> None:
    assert api.look(serve(cuts=[1000, 1000])).manifest is not None


def test_no_range_is_taken(place: Path) -> None:
    """Neither to look into the file, nor to go on where a download broke off."""

    class Whole(Files):
        def do_GET(self) -> None:
            self.answer(416, b"", {}) if "Range" in self.headers else super().do_GET()

    with served(Whole, raw=Path("r.ktr").read_bytes(), seen=[], statuses=[], cuts=[1000], sent=[]) as address:
        assert api.unpack(f"{address}/r.ktr", "out").out.is_dir()


def header(place: Path, name: str, value: str, **how: Any) -> Any:
    """A server one of whose headers is another."""

    class Odd(Files):
        def send_header(self, keyword: str, told: str) -> None:
            super().send_header(keyword, value if keyword == name else told)

        def end_headers(self) -> None:
            if name not in ("Content-Length", "Retry-After"):
                super().send_header(name, value)
            super().end_headers()

    settings = {"raw": (place / "r.ktr").read_bytes(), "seen": [], "statuses": [], "cuts": [], "sent": [], **how}
    return served(Odd, **settings)


@pytest.mark.parametrize(
    ("name", "value", "how", "words"),
    [
        ("Content-Encoding", "gzip", {}, r"sends the file packed \(gzip\)"),
        ("Retry-After", "Fri, 31 Dec 2123 23:59:59 GMT", {"statuses": [503]}, r"asks to be left for \d+ seconds"),
        ("Retry-After", "soon", {"statuses": [429] * 9}, "the server says 429"),
        ("Location", "/again", {"statuses": [302] * 99}, "says 302 The HTTP server .* infinite loop.$"),
    ],
)
def test_headers_that_say_something_else(
    place: Path, serve: Serve, name: str, value: str, how: dict[str, Any], words: str
) -> None:
    with header(place, name, value, **how) as address, pytest.raises(KtmergeError, match=words):
        api.unpack(f"{address}/r.ktr", "out")
    assert not Path("out").exists()


def test_a_size_of_nothing_is_no_size(place: Path, serve: Serve) -> None:
    class Lazy(Files):
        def do_HEAD(self) -> None:
            self.answer(200, b"", {})

    with served(Lazy, raw=Path("r.ktr").read_bytes(), seen=[], statuses=[], cuts=[], sent=[]) as address:
        assert api.look(f"{address}/r.ktr").size is None
        assert api.unpack(f"{address}/r.ktr", "out").out.is_dir()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\n<!DOCTYPE html><title>Log in</title>", "is no bundle, but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "'git lfs pull' fetches the file"),
        (b"\x1f\x8b\x08" + bytes(99), "something that gzip made"),
        (b"", "does not end as a zip does"),
    ],
    ids=["page", "pointer", "gzip", "nothing"],
)
def test_what_is_taken_for_a_bundle(place: Path, serve: Serve, raw: bytes, words: str) -> None:
    Path("taken.ktr").write_bytes(raw)
    for reference in ("taken.ktr", serve(raw=raw), serve(raw=raw, pieces=False)):
        with pytest.raises(UsageError, match=words):
            api.unpack(reference, "out")
    assert not Path("out").exists()


@pytest.mark.every(3)
@pytest.mark.parametrize(("status", "code"), [(401, 2), (403, 2), (409, 2), (408, 1), (429, 1), (500, 1), (599, 1)])
def test_statuses(place: Path, serve: Serve, ktmerge: Any, capsys: Any, status: int, code: int) -> None:
    address = serve(statuses=[status] * 9)
    assert ktmerge("recipe", "pull", address, "--yes", "--out", "out") == code
    assert ktmerge("recipe", "push", "r.ktr", serve(statuses=[status] * 9)) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(f"the server says {status}" in line for line in said)


def test_a_server_that_does_not_listen_to_the_end_says_why(place: Path, tmp_path: Path, serve: Serve) -> None:
    class Deaf(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with served(Deaf) as address, pytest.raises(UsageError, match="the server says 403"):
        put(f"{address}/r.ktr", lambda archive: (archive.touch(), os.truncate(archive, 1 << 26))[0])


def test_a_connection_that_breaks_in_its_own_way() -> None:
    """TLS has errors that are no ConnectionError; they are no file's either."""

    class Broken(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            raise ssl.SSLError("record layer failure")

    with pytest.raises(ConnectionError, match="record layer failure"):
        _Watched(Broken()).readinto(bytearray(1))
