"""Downloads that were stopped, or that never end, from an address and from a hub."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import Handler, served

from ktmerge import api
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.sharing import opening
from ktmerge.sharing.fetching import Remote


class Shelf(BaseHTTPRequestHandler):
    """One file with an etag, in pieces or not; begins another when asked to go on, if told to."""

    raw: bytes
    tag = '"one"'
    asked: list[dict[str, str]]
    wrong = False

    def do_HEAD(self) -> None:
        self.answer(200, b"", {"Content-Length": str(len(self.raw))})

    def do_GET(self) -> None:
        self.asked.append(dict(self.headers))
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.headers.get("If-Range", self.tag) != self.tag:
            self.answer(200, self.raw, {"Content-Length": str(len(self.raw))})
            return
        start, stop = int(match[1]) * (not self.wrong), int(match[2] or len(self.raw) - 1) + 1
        told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(self.raw)}", "Content-Length": str(stop - start)}
        self.answer(206, self.raw[start:stop], told)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"ETag": self.tag, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Watcher:
    """A progress that stops a fetch after so many bytes, as Ctrl-C would, and knows what it was told."""

    def __init__(self, most: float = float("inf")) -> None:
        self.most, self.steps, self.notes = most, {}, []  # type: ignore[var-annotated]

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Any]:
        self.description = description.partition(" ")[0]
        self.steps[self.description] = 0.0
        yield self

    def advance(self, amount: float = 1) -> None:
        self.steps[self.description] += amount
        if self.description == "fetch" and self.steps["fetch"] > self.most:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktmerge.sharing.unpacking._WORTH_KEEPING", 500)
    monkeypatch.setattr("ktmerge.sharing.fetching._BLOCK", 100)
    monkeypatch.setattr("ktmerge.sharing.retrying._FIRST", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def left() -> list[Path]:
    return sorted(Path().glob(".out.ktmerge-*"))


@pytest.mark.parametrize(("first", "second"), [('"1"', '"1"'), ('"1"', '"2"'), ('W/"1"', 'W/"1"')])
def test_a_stopped_download_goes_on_if_it_is_the_same_file(place: Path, first: str, second: str) -> None:
    raw = (place / "r.ktr").read_bytes()
    with served(Shelf, raw=raw, asked=[], tag=first) as address, pytest.raises(KeyboardInterrupt):
        api.unpack(f"{address}/r.ktr", "out", progress=(watcher := Watcher(1000)))
    (folder,) = left()
    assert not Path("out").exists()
    assert watcher.notes == ["0.0 MB were fetched, and are kept: the same command goes on from there."]
    (partial,) = folder.iterdir()
    there = partial.stat().st_size
    assert partial.read_bytes() == raw[:there]
    asked: list[dict[str, str]] = []
    with served(Shelf, raw=raw, asked=asked, tag=second) as address:
        api.unpack(f"{address}/r.ktr", "out", progress=(watcher := Watcher()))
    is_same = first == second and not first.startswith("W")
    assert asked[-1].get("Range") == (f"bytes={there}-" if is_same else None)
    assert watcher.steps == {"fetch": len(raw), "check": watcher.steps["check"]}
    assert Path("out/recipe.yaml").is_file()
    assert not left()


def test_what_was_kept_and_is_broken_is_not_kept_again(place: Path) -> None:
    raw = (place / "r.ktr").read_bytes()
    with served(Shelf, raw=raw, asked=[]) as address:
        with pytest.raises(KeyboardInterrupt):
            api.unpack(f"{address}/r.ktr", "out", progress=Watcher(1000))
        (partial,) = left()[0].iterdir()
        partial.write_bytes(bytes(partial.stat().st_size))
        with pytest.raises(UsageError):
            api.unpack(f"{address}/r.ktr", "out")
        assert not left()
        api.unpack(f"{address}/r.ktr", "out")


def test_another_part_than_was_asked_for_is_not_taken(place: Path) -> None:
    """Nor told twice."""
    raw, asked = bytes(range(256)) * 20, []  # type: ignore[var-annotated]
    Path("x.partial").write_bytes(raw[:1000])
    watcher = Watcher()
    with served(Shelf, raw=raw, asked=asked, wrong=True) as address:
        remote = Remote("x", len(raw), None, lambda headers: opening.opened(address, headers, print), again)
        with watcher.task("fetch x", None):
            remote.fetch(Path("x"), watcher)
    assert [one.get("Range") for one in asked] == ["bytes=1000-", None]
    assert Path("x").read_bytes() == raw
    assert watcher.steps["fetch"] == len(raw)


def again(call: Any) -> None:
    try:
        call()
    except IncompleteRead:
        call()


def test_what_came_fast_excuses_nothing_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    sent = iter([1 << 30, *[1] * 9])

    class Slower(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            clock[0] += 50
            return next(sent)

    watched = opening._Watched(Slower())
    for _ in range(3):  # a minute is over after two
        watched.readinto(bytearray(1))
    with pytest.raises(opening.EndlessError, match="less than 1000 bytes a second"):
        watched.readinto(bytearray(1))


def test_a_hub_goes_on_with_the_large_file_and_fetches_no_other_again(place: Path, hub: Any) -> None:
    api.push("recipe.yaml", "me/half", with_deltas=True)
    (delta,) = hub.state.objects.values()
    with pytest.raises(KeyboardInterrupt):
        api.unpack("me/half", "out", progress=Watcher(len(delta)))  # after the card, in the midst of the delta
    (partial,) = left()[0].rglob("*.partial")
    there = partial.stat().st_size
    assert partial.name == "delta.bin.partial"
    offer = api.look("me/half")
    hub.state.seen.clear()
    api.unpack(offer, "out", progress=(watcher := Watcher()))
    (asked,) = hub.state.requests("GET", "/lfs/")
    assert asked["Range"] == f"bytes={there}-"
    assert not hub.state.requests("GET", "README.md")
    assert watcher.steps["fetch"] == offer.size
    assert Path("out/delta/delta.bin").read_bytes() == delta
    assert not left()


@pytest.mark.parametrize(("free", "remote"), [(1.5, False), (1.5, True), (2.5, True)])
def test_room_is_asked_for_what_comes_and_what_it_becomes(
    place: Path, monkeypatch: pytest.MonkeyPatch, free: float, remote: bool
) -> None:
    raw = (place / "r.ktr").read_bytes()
    size = api.look("r.ktr").size or 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free * size))
    with served(Shelf, raw=raw, asked=[]) as address:
        if remote and free < 2:
            with pytest.raises(KtmergeError, match="are free on that disk"):
                api.unpack(f"{address}/r.ktr", "out")
        else:
            api.unpack(f"{address}/r.ktr" if remote else "r.ktr", "out")


def test_a_token_is_for_the_hub_alone(place: Path, hub: Any) -> None:
    hub.state.needs_token_to_read = True
    api.push("recipe.yaml", "me/half", with_deltas=True)
    hub.state.seen.clear()
    api.unpack("me/half", "out")
    (there,) = hub.state.requests("GET", "/lfs/")
    assert "Authorization" not in there
    assert all("Authorization" in told for told in hub.state.requests("GET", "/resolve/"))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("/resolve/", r"me/half/\S+: sends less than 1000 bytes"),
        ("/api/", "me/half: the hub did not end its answer in"),
    ],
)
def test_a_hub_that_drips(place: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, part: str, words: str) -> None:
    """A file, or what it says of one."""
    api.push("r.ktr", "me/half")
    monkeypatch.setattr("ktmerge.sharing.opening._PATIENCE", 0.2)
    monkeypatch.setattr("ktmerge.sharing.hub._LONGEST", 0.3)
    over, whole = threading.Event(), Handler._answer

    def drip(self: Handler, status: int, body: bytes, headers: dict[str, str], only: int | None = None) -> None:
        if self.command == "HEAD" or part not in self.path:
            whole(self, status, body, headers, only)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):
            for one in body:
                if over.wait(0.02):
                    return
                self.wfile.write(bytes([one]))

    monkeypatch.setattr(Handler, "_answer", drip)
    try:
        with pytest.raises(KtmergeError, match=f"{words}.*given up") as caught:
            api.unpack("me/half", "out")
        assert caught.value.exit_code == 1
    finally:
        over.set()
