"""Workers of a sweep on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch

from ktmerge.errors import KtmergeError
from ktmerge.sweep import launch
from ktmerge.sweep.settings import SweepSettings


def test_workers_share_the_cores_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(launch, "search", lambda settings, progress: torch.get_num_threads())
    started: list[Any] = []
    monkeypatch.setattr(launch, "_start", lambda process: started.append(process._args))
    monkeypatch.setattr("ktmerge.sweep.voices.Chorus.listen", lambda *_: None)
    try:
        torch.set_num_threads(5)
        settings = cast(SweepSettings, None)
        assert launch._here(settings, 2, launch.SILENT) == 2
        assert launch._here(settings, 9, launch.SILENT) == 1
        assert {threads for _, threads, _ in started} == {2, 1}
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)


@dataclass
class Job:
    """One of a launcher, which ends after so many looks, and badly if it has a reason."""

    job_id: str
    looks: int
    reason: str = ""

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def result(self) -> str:
        if self.reason:
            raise RuntimeError(self.reason)
        return self.job_id


def test_a_worker_that_dies_is_told_of_when_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when those that were started before it are done."""
    monkeypatch.setattr(launch, "_PAUSE", 0)
    notes: list[str] = []
    progress = cast(Any, type("Told", (), {"note": lambda self, text: notes.append(text)})())
    jobs = [Job("a", 9), Job("b", 1, "out of memory\n  at x"), Job("c", 3), Job("d", 5, "lost")]
    assert launch._first(launch._as_they_end(jobs), progress) == "c"
    assert notes == ["job b cannot go on: out of memory at x"]
    with pytest.raises(KtmergeError, match="all 2 workers failed; the first: lost"):
        launch._first(launch._as_they_end([Job("a", 9, "late"), Job("d", 5, "lost")]), progress)


def test_so_is_an_actor() -> None:
    notes: list[str] = []
    progress = cast(Any, type("Told", (), {"note": lambda self, text: notes.append(text)})())

    class Cluster:
        @staticmethod
        def wait(left: list[Job], num_returns: int) -> tuple[list[Job], list[Job]]:
            first = min(left, key=lambda one: one.looks)
            return [first], [one for one in left if one is not first]

        get = staticmethod(Job.result)

    running = [Job("a", 9), Job("b", 1, "lost"), Job("c", 3)]
    assert launch._first(launch._as_they_come(Cluster, running), progress) == "c"
    assert notes == ["actor 2 cannot go on: lost"]
