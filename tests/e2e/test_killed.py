"""Blends killed at any moment: the previous output stays, and --resume comes to the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import command, digests, ktmerge

from ktmerge.checkpoints.journal import FILE

pytestmark = pytest.mark.slow

KILLS = 55


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("blend", "-r", "recipe.yaml", "--out", "place/out", "--overwrite", *arguments),
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill(process: subprocess.Popen[str], ready: Callable[[], bool], after: float = 0) -> str:
    """SIGKILL some seconds after something is so; what the process said."""
    while process.poll() is None and not ready():
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    return process.communicate()[1]


def lines(place: Path) -> int:
    """How many lines the journal of the run in ``place`` has."""
    try:
        return sum((place / name / FILE).read_bytes().count(b"\n") for name in hidden(place))
    except OSError:
        return 0


def test_killed_at_random_moments_and_resumed(large: Path) -> None:
    place, out = large / "place", large / "place" / "out"
    ktmerge("blend", "-r", "recipe.yaml", "--set", "blend.density=0.9", "--out", "old", cwd=large)
    started = time.monotonic()
    ktmerge("blend", "-r", "recipe.yaml", "--out", "whole", cwd=large)
    whole_time = time.monotonic() - started
    old, new = digests(large / "old"), digests(large / "whole")
    assert old.keys() == new.keys()
    assert old != new

    generator = random.Random(0)
    shutil.copytree(large / "old", out)
    kills = finished = 0
    resumed: list[str] = []
    while kills < KILLS:
        process = start(large, "--resume")
        if generator.random() < 0.4:
            said = kill(process, lambda: True, generator.uniform(0, whole_time))
        else:  # in the midst of the tensors, which are most of a blend only where models are larger
            wanted = max(lines(place), 1) + generator.randint(0, 8)
            said = kill(process, lambda wanted=wanted: lines(place) >= wanted, generator.uniform(0, 0.02))
        resumed += [line for line in said.splitlines() if line.startswith("going on with")]
        kills += process.returncode == -signal.SIGKILL
        found = digests(out)
        assert found in (old, new), "the output is neither the old nor the new one"
        assert len(hidden(place)) <= 1
        if found == new:
            finished += 1
            shutil.rmtree(out)
            shutil.copytree(large / "old", out)
    assert sum(" finished 0 " not in line for line in resumed) > 5, resumed
    ktmerge("blend", "-r", "recipe.yaml", "--out", "place/out", "--overwrite", "--resume", cwd=large)
    assert digests(out) == new
    assert os.listdir(place) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("resumable", [False, True])
def test_a_signal_leaves_something_only_if_asked(large: Path, number: int, resumable: bool) -> None:
    generator = random.Random(number)
    place = large / "place"
    place.mkdir()
    ktmerge("blend", "-r", "recipe.yaml", "--out", "old", cwd=large)
    stopped = left = 0
    for _ in range(12):
        process = start(large, *(["--resume"] if resumable else []))
        while process.poll() is None and f".out.ktmerge-{process.pid}" not in hidden(place):
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.15))
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode in (0, 130), said
        assert "Traceback" not in said
        stopped += process.returncode == 130
        left += bool(hidden(place))
        assert process.returncode == 0 or "interrupted" in said
        if "out" in os.listdir(place):  # the signal came too late
            assert digests(place / "out") == digests(large / "old")
            shutil.rmtree(place / "out")
        assert resumable or os.listdir(place) == []
    assert stopped
    assert bool(left) == resumable


def test_a_plain_run_says_what_it_removed(small: Path) -> None:
    (small / "place").mkdir()
    process = start(small)
    kill(process, lambda: bool(hidden(small / "place")))
    assert hidden(small / "place")
    done = ktmerge("blend", "-r", "recipe.yaml", "--out", "place/out", cwd=small)
    assert "removed what an interrupted run left" in done.stderr
    assert os.listdir(small / "place") == ["out"]
