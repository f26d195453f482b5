"""What several workers say on one terminal."""

from __future__ import annotations

import multiprocessing
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from ktmerge.errors import KtmergeError
from ktmerge.sweep import launch
from ktmerge.sweep.voices import Chorus


class Notes:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def task(self, *_: object) -> Any:
        yield None

    def note(self, text: str) -> None:
        self.said.append(text)


def heard(chorus: Chorus, monkeypatch: pytest.MonkeyPatch, life: Any, code: int = 0) -> None:
    """Let a second worker live here, and the chorus listen to it."""
    notes, told = multiprocessing.Pipe(duplex=False)
    monkeypatch.setattr(launch, "search", lambda settings, progress: life(progress))
    monkeypatch.setattr(launch, "_follow", lambda: None)
    with told:
        launch._beside(None, 1, told)  # type: ignore[arg-type]
    chorus.listen(2, SimpleNamespace(join=lambda: None, exitcode=code), notes)  # type: ignore[arg-type]


def test_notes_and_warnings_of_all_are_told_once_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Notes()
    chorus = Chorus(progress)
    chorus.first.note("compiling")

    def life(own: Any) -> None:
        own.note("compiling")
        own.note("trial 3")
        warnings.warn("odd\nmodel", UserWarning, stacklevel=1)

    with chorus.first.speaking():
        warnings.warn("old model", UserWarning, stacklevel=1)
    heard(chorus, monkeypatch, life)
    assert progress.said == [
        "worker 1: compiling", "worker 1: UserWarning: old model", "worker 2: trial 3",
        "worker 2: UserWarning: odd\nmodel",
    ]  # fmt: skip
    chorus.end()
    chorus.first.note("late")
    assert len(progress.said) == 4


def test_the_end_of_a_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Notes()

    def life(_: Any) -> None:
        raise KtmergeError("the disk is full.")

    heard(Chorus(progress), monkeypatch, life)
    heard(Chorus(progress), monkeypatch, lambda _: None, code=-9)
    assert progress.said == [
        "worker 2: cannot go on: the disk is full.",
        "worker 2: died (SIGKILL); what it had begun is taken up by the others.",
    ]  # fmt: skip
