"""Pushes and pulls in processes of their own, killed at any moment and started again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from bundle_models import RECIPE, SUITE, write_model
from hub_server import TOKEN, Handler, Repository, State, served

from ktmerge import api


class Paced:
    """Lets a moment pass after every few bytes, so that a kill may fall between."""

    def setup(self) -> None:
        super().setup()  # type: ignore[misc]
        write = self.wfile.write  # type: ignore[has-type]

        class Writer:
            closed = False

            def write(self, raw: bytes) -> None:
                for start in range(0, len(raw), 4096):
                    write(raw[start : start + 4096])
                    time.sleep(0.002)

            def flush(self) -> None:
                pass

            close = flush

        self.wfile = Writer()


class PacedHub(Paced, Handler):
    pass


class Shelf(Paced, BaseHTTPRequestHandler):
    """One file: what was put there last, as a whole."""

    shelf: list[bytes]

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        raw = self.rfile.read(size)
        if len(raw) == size:
            self.shelf[:] = [raw]
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(self.shelf[0])

    def do_GET(self) -> None:
        self._answer(self.shelf[0])

    def _answer(self, raw: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class World:
    """Two bundles, ``0.ktr`` and ``1.ktr``, the places they go to, and a machine that takes them there."""

    home: Path
    environment: dict[str, str]
    state: State
    shelf: list[bytes]
    address: str

    def files(self, number: int) -> dict[str, bytes]:
        return files_of(self.home / str(number))

    def there(self, place: str) -> dict[str, bytes]:
        """What lies at a place, as anybody would take it."""
        if place == "folder":
            return files_of(self.home / "shared")
        if place == "url":
            (self.home / "seen.ktr").write_bytes(self.shelf[0])
            return files_of(api.unpack(self.home / "seen.ktr", self.home / "seen", overwrite=True).out)
        repository = self.state.repositories["me/half" if place == "hub" else "org/model"]
        files = repository.commits[repository.branches["main"]]
        start = "" if place == "hub" else "ktmerge-recipe/"
        return {name.removeprefix(start): raw for name, raw in files.items() if name.startswith(start)}

    def arguments(self, place: str, verb: str) -> list[str]:
        named = {"hub": ["me/half"], "model": ["--into", "org/model"], "folder": ["./shared"], "url": [self.address]}
        return [*named[place], *(["--overwrite"] if place == "folder" or verb == "pull" else [])]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ktmerge", "recipe", *arguments], cwd=self.home, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self, *arguments: str) -> float:
        """Seconds until it is done."""
        began = time.monotonic()
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        return time.monotonic() - began

    def left(self) -> list[str]:
        """Unfinished things that lie about."""
        temporary = Path(self.environment["TMPDIR"])
        return sorted(path.name for folder in (self.home, temporary) for path in folder.glob(".*ktmerge-*"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("killed")
    for seed, name in enumerate(("base", "spam")):
        write_model(home / name, seed, width=256)
    (home / "recipe.yaml").write_text(RECIPE)
    (home / "suite.yaml").write_text(SUITE)
    for number in range(2):
        overrides = [f"blend.lambda={(number + 1) / 4}"]
        api.pack(home / "recipe.yaml", home / f"{number}.ktr", overrides=overrides, with_deltas=True)
        api.unpack(home / f"{number}.ktr", home / str(number))
    state, shelf = State(), [(home / "0.ktr").read_bytes()]
    state.repositories["org/model"] = Repository()
    state.repositories["org/model"].commit({"config.json": b"{}"})
    (home / "tmp").mkdir()
    with ExitStack() as stack:
        hub = stack.enter_context(served(PacedHub, state=state))
        address = stack.enter_context(served(Shelf, shelf=shelf)) + "/r.ktr"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": hub, "HF_HOME": str(home / ".hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1,localhost", "HF_HUB_DISABLE_TELEMETRY": "1", "TMPDIR": str(home / "tmp"),
        }  # fmt: skip
        made = World(home, environment, state, shelf, address)
        for place in ("hub", "model", "folder", "url"):
            made.finish("push", "0.ktr", *made.arguments(place, "push"))
        yield made


def killed(process: subprocess.Popen[str], number: int, seconds: float) -> str:
    """Kill after so long; what it says, empty if it was done before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        return ""
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), err
    assert "Traceback" not in err
    return f"killed {err}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda one: one.name)
@pytest.mark.parametrize("verb", ["push", "pull"])
@pytest.mark.parametrize("place", ["hub", "model", "folder", "url"])
def test_killed_and_started_again(world: World, place: str, verb: str, number: signal.Signals) -> None:
    numbers = random.Random(f"{place} {verb} {number.name}")
    new = next(one for one in range(2) if not same(world, world.there(place), one))
    push = ["push", f"{new}.ktr", *world.arguments(place, "push")]
    pull = ["pull", *world.arguments(place, "pull"), "--yes", "--out", "theirs"]
    command = push if verb == "push" else pull
    seconds = world.finish(*(["push", f"{1 - new}.ktr", *world.arguments(place, "push")] if verb == "push" else pull))
    if verb == "pull":
        world.finish(*push)
    said = killed(world.start(*command), number, numbers.uniform(0.3, 1.0) * seconds)
    if said and number != signal.SIGKILL:
        assert "interrupted; nothing was left half-written" in said
        assert not world.left()
    found = world.there(place) if verb == "push" else files_of(world.home / "theirs")
    assert same(world, found, 0) or same(world, found, 1)
    world.finish(*command)
    found = world.there(place) if verb == "push" else files_of(world.home / "theirs")
    assert same(world, found, new)
    assert not world.left()


def same(world: World, found: dict[str, bytes], number: int) -> bool:
    return {name: raw for name, raw in found.items() if name != ".gitattributes"} == world.files(number)
