"""Workers of a sweep on one machine."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

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
