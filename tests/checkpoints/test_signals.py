"""Steps that no signal cuts in two, and threads that end with whom they work for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from ktmerge.checkpoints import staging
from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.checkpoints.staging import Staging
from ktmerge.checkpoints.workers import Workers
from ktmerge.checkpoints.workroom import workroom

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """What was heard; each signal raises, as it does in a command."""
    found: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        found.append(number)
        raise KeyboardInterrupt

    before = [signal.signal(number, stop) for number in STOPPING]
    yield found
    for number, handler in zip(STOPPING, before, strict=True):
        signal.signal(number, handler)


def test_signals_wait_and_all_are_heard_again_afterwards(heard: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in STOPPING]
    done = []

    def step() -> None:
        with uninterrupted(), uninterrupted():
            for number in STOPPING:
                signal.raise_signal(number)
            done.append(list(heard))

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == [[]]
    assert sorted(heard) == sorted(STOPPING)
    assert [signal.getsignal(number) for number in STOPPING] == handlers


def test_a_pool_waits_for_a_thread_that_was_beginning(heard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    start, pool, finished = threading.Thread.start, Workers(2), threading.Event()

    def work() -> None:
        time.sleep(0.05)
        finished.set()

    def starting(thread: threading.Thread) -> None:
        start(thread)
        os.kill(os.getpid(), signal.SIGINT)  # on a busy machine it comes while the thread is waited for

    monkeypatch.setattr(threading.Thread, "start", starting)
    with pytest.raises(KeyboardInterrupt), pool:
        pool.submit(work)
    assert finished.is_set()


def test_a_pool_left_by_an_exception_begins_nothing_more() -> None:
    going, begun, futures = threading.Event(), [], []

    def work(number: int) -> None:
        begun.append(number)
        going.wait()

    def leave() -> None:
        with Workers(1) as pool:
            futures.extend(pool.submit(work, number) for number in range(3))
            futures[-1].add_done_callback(lambda _: going.set())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert begun in ([], [0])
    assert all(future.cancelled() for future in futures[1:])


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_while_leftovers_are_removed(
    tmp_path: Path, heard: list[int], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = staging.shutil.rmtree

    def removing(path: Path, **keywords: bool) -> None:
        signal.raise_signal(number)
        remove(path, **keywords)

    monkeypatch.setattr(staging.shutil, "rmtree", removing)
    room = Staging(tmp_path / "out", overwrite=False)
    room.open()
    with pytest.raises(KeyboardInterrupt):
        room.discard()
    with pytest.raises(KeyboardInterrupt), workroom(tmp_path / "out") as folder:
        (folder / "half").touch()
    assert os.listdir(tmp_path) == []
    assert heard == [number, number]
