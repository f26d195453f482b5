"""When a step is logged, evaluated and saved; and what Ctrl-C does to it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ktmerge.progress import SILENT
from ktmerge.tuners import callbacks
from ktmerge.tuners.callbacks import Interruption, Rhythm, RhythmCallback


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(callbacks, "monotonic", found)
    return found


def due(rhythm: Rhythm, clock: Clock, seconds_per_step: float = 0.0) -> dict[str, list[int]]:
    """The steps at which each thing happens."""
    saved: list[int] = []
    callback = RhythmCallback(rhythm, Interruption(SILENT), lambda path, step: saved.append(step))
    found: dict[str, list[int]] = {"log": [], "evaluate": [], "stop": []}
    for step in range(1, rhythm.total + 1):
        clock.now += seconds_per_step
        control = callback.on_step_end(None, SimpleNamespace(global_step=step), SimpleNamespace())
        for name, flag in (("log", "should_log"), ("evaluate", "should_evaluate"), ("stop", "should_training_stop")):
            if getattr(control, flag):
                found[name].append(step)
        if control.should_save:
            callback.on_save(SimpleNamespace(output_dir="x"), SimpleNamespace(global_step=step), control)
    return {**found, "save": saved}


def test_the_first_and_the_last_step_are_logged_and_the_last_evaluated(clock: Clock) -> None:
    found = due(Rhythm(total=10, log_every=4, eval_every=3, save_every=5, evaluates=True), clock)
    assert found == {"log": [1, 4, 8, 10], "evaluate": [3, 6, 9, 10], "stop": [10], "save": [5]}
    assert due(Rhythm(10, 4, 3, 20, evaluates=False), clock)["evaluate"] == []


def test_unasked_saves_are_a_fifth_of_the_run_and_five_minutes_apart(clock: Clock) -> None:
    rhythm = Rhythm(total=50, log_every=1, eval_every=1, save_every=None, evaluates=False)
    assert due(rhythm, clock, seconds_per_step=1)["save"] == []
    assert due(rhythm, clock, seconds_per_step=20)["save"] == [20, 40]
    assert due(rhythm, clock, seconds_per_step=60)["save"] == [10, 20, 30, 40]


def test_the_first_ctrl_c_asks_and_the_second_stops(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(callbacks, "leave_terminal", lambda: left.append(True))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def interrupted(*signals: int, apart: float = 2.0, by_others: bool = False) -> Interruption:
        with Interruption(SILENT) as asked:
            asked.requested = by_others
            for number in signals:
                os.kill(os.getpid(), number)
                clock.now += apart
        return asked

    assert not interrupted().requested
    assert interrupted(signal.SIGINT).requested
    assert interrupted(signal.SIGTERM).requested
    assert not left
    assert interrupted(signal.SIGHUP).requested
    assert left  # a note to a terminal that has hung up would fail
    assert interrupted(signal.SIGINT, signal.SIGTERM, apart=0.1).requested  # one wish, passed on by a launcher
    assert interrupted(signal.SIGINT, by_others=True).requested  # the same, heard by another process before
    with pytest.raises(KeyboardInterrupt):
        interrupted(signal.SIGTERM, signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts it
    assert not interrupted(signal.SIGHUP).requested


def test_a_request_saves_the_step_and_stops(tmp_path: Path) -> None:
    asked: Any = SimpleNamespace(requested=True)
    callback = RhythmCallback(Rhythm(10, 1, 5, 5, evaluates=True), asked, lambda path, step: None)
    control = callback.on_step_end(None, SimpleNamespace(global_step=2), SimpleNamespace())
    assert control.should_save
    assert control.should_training_stop
    assert not control.should_evaluate
