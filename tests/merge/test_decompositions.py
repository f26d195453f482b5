"""The cache of decompositions: exact, bounded, and safe from other processes and torn files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend, decompositions
from ktmerge.merge.decompositions import Store, eigh, keeping


def symmetric(seed: int, size: int = 20) -> Tensor:
    half = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half + half.T


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.decomposition"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is really decomposed."""
    done: list[str] = []

    exact = decompositions._eigh

    def count(matrices: Tensor) -> tuple[Tensor, Tensor]:
        done.append("_eigh")
        return exact(matrices)

    monkeypatch.setattr(decompositions, "_eigh", count)
    return done


def test_off_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]) -> None:
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path))
    monkeypatch.delenv("KTMERGE_CACHE_GB", raising=False)
    for setting in (None, "0", ""):
        if setting is not None:
            monkeypatch.setenv("KTMERGE_CACHE_GB", setting)
        eigh(symmetric(0))
        eigh(symmetric(0))
    assert counted == ["_eigh"] * 6
    assert not list(tmp_path.iterdir())


def test_the_environment_switches_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]) -> None:
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path))
    monkeypatch.setenv("KTMERGE_CACHE_GB", "0.01")
    assert eigh(symmetric(0))[1].equal(eigh(symmetric(0))[1])
    assert counted == ["_eigh"]
    assert len(entries(tmp_path / "decompositions")) == 1
    monkeypatch.setenv("KTMERGE_CACHE_GB", "much")
    with pytest.raises(UsageError, match="number of gigabytes"):
        eigh(symmetric(0))


def test_what_was_kept_comes_back_bit_for_bit(tmp_path: Path, counted: list[str]) -> None:
    matrix = symmetric(0)
    exact = eigh(matrix)
    counted.clear()
    with keeping(0.01, tmp_path):
        for _ in range(3):
            assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(eigh(matrix), exact, strict=True))
    assert counted == ["_eigh"]
    eigh(matrix)
    assert len(counted) == 2  # off again


def test_other_matrices_shapes_and_types_are_other_entries(tmp_path: Path, counted: list[str]) -> None:
    with keeping(0.01, tmp_path):
        whole = symmetric(0, 6)
        for one in (whole, whole[:4, :4], -whole, whole.float(), torch.zeros(6, 6), -torch.zeros(6, 6)):
            eigh(one)
    assert len(counted) == len(entries(tmp_path)) == 6
    with keeping(0.01, tmp_path):
        eigh(whole.T)  # the same matrix, laid out otherwise
    assert len(counted) == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "header"])
def test_damaged_entries_count_as_none(tmp_path: Path, counted: list[str], damage: str) -> None:
    matrix = symmetric(0)
    with keeping(0.01, tmp_path):
        exact = eigh(matrix)
        (path,) = entries(tmp_path)
        data = bytearray(path.read_bytes())
        position = 3 if damage == "header" else len(data) // 2
        data[position] ^= 1
        path.write_bytes({"cut": bytes(data[: len(data) // 2]), "empty": b""}.get(damage, bytes(data)))
        assert all(a.equal(b) for a, b in zip(eigh(matrix), exact, strict=True))
        assert len(counted) == 2
        eigh(matrix)
        assert len(counted) == 2  # and is whole again


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, counted: list[str]) -> None:
    with keeping(1, tmp_path):
        eigh(symmetric(0))
        (first,) = entries(tmp_path)
    size = first.stat().st_size
    with keeping(3.5 * size / 1e9, tmp_path):
        for seed in (1, 2):
            eigh(symmetric(seed))
        for age, path in enumerate(entries(tmp_path)):
            os.utime(path, ns=(10**9 * (100 + age), 10**9 * (100 + age)))
        os.utime(first, ns=(1, 1))
        eigh(symmetric(0))  # used again: now the youngest
        eigh(symmetric(3))
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 3.5 * size
        assert first in entries(tmp_path)
        counted.clear()
        eigh(symmetric(0))
        assert not counted


def test_what_is_larger_than_all_the_room_is_not_kept(tmp_path: Path) -> None:
    with keeping(1e-6, tmp_path):
        eigh(symmetric(0))
    assert not list(tmp_path.iterdir())
    with keeping(0, tmp_path):
        eigh(symmetric(0))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with keeping(0.01, tmp_path / "file" / "below"):
        eigh(symmetric(0))


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for name, age in ((".writing-old", 7200), (".writing-young", 10)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    with keeping(0.01, tmp_path):
        eigh(symmetric(0))
    assert {path.name for path in tmp_path.glob(".writing-*")} == {".writing-young"}


def test_threads_share_it(tmp_path: Path) -> None:
    exact = [eigh(symmetric(seed)) for seed in range(8)]
    wrong: list[int] = []

    def work() -> None:
        for seed in range(8):
            if not eigh(symmetric(seed))[1].equal(exact[seed][1]):
                wrong.append(seed)

    with keeping(0.01, tmp_path):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(entries(tmp_path)) == 8


WORK = """
import sys, torch
from pathlib import Path
from ktmerge.merge.decompositions import eigh, keeping
torch.set_num_threads(1)
with keeping(float(sys.argv[2]), Path(sys.argv[1])):
    for turn in range(int(sys.argv[3])):
        for seed in range(12):
            half = torch.randn(20, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            values, vectors = eigh(half + half.T)
            back = (vectors * values) @ vectors.T
            assert torch.allclose(back, half + half.T, atol=1e-10), "not this matrix's"
"""


def start(folder: Path, gigabytes: float, turns: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORK, str(folder), str(gigabytes), str(turns)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_processes_share_it_and_may_be_killed(tmp_path: Path) -> None:
    """Room for a third of the entries, so that everybody writes and drops all the time; two are killed on the way."""
    with keeping(1, tmp_path):
        eigh(symmetric(0))
    room = 4.5 * entries(tmp_path)[0].stat().st_size / 1e9
    steady = [start(tmp_path, room, 40) for _ in range(2)]
    doomed = [start(tmp_path, room, 10**6) for _ in range(2)]
    time.sleep(6)
    for process in doomed:
        process.kill()
        process.communicate()
    for process in steady:
        _, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors.decode()
    left = entries(tmp_path)
    assert left
    store = Store(tmp_path, int(room * 1e9))
    for path in left:
        assert store.get(path.name.removesuffix(".decomposition")) is not None
    with keeping(room, tmp_path):
        eigh(symmetric(77))
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= room * 1e9


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """Has decompositions made on a device that is the CPU under another name."""
    monkeypatch.setenv(decompositions.PLACE, "cuda:0")
    monkeypatch.setattr(decompositions, "_place", {"cuda:0": "cpu:0", "cpu": "cpu"}.__getitem__)
    return "cpu:0"


def test_a_device_is_given_them_if_asked_for(elsewhere: str, counted: list[str]) -> None:
    matrix = symmetric(3)
    values, vectors = decompositions.eigh(matrix)
    assert counted == ["_eigh"]
    assert torch.equal(values, torch.linalg.eigh(matrix)[0])
    assert {one.device.type for one in (values, vectors)} == {"cpu"}


def test_what_a_device_found_is_not_taken_for_what_the_cpu_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    with decompositions.keeping(1, tmp_path):
        decompositions.eigh(symmetric(3))
        monkeypatch.setattr(decompositions, "_place", lambda wanted: "cuda:0")
        there_is_none_here = lambda there, matrices: [decompositions._eigh(one) for one in matrices]  # noqa: E731
        monkeypatch.setattr(decompositions, "_on_device", there_is_none_here)
        decompositions.eigh(symmetric(3))
        decompositions.eigh(symmetric(3))
    assert counted == ["_eigh", "_eigh"]
    assert len(entries(tmp_path)) == 2


def test_a_device_whose_memory_is_full_is_named(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.raises(KtmergeError, match=r"cpu:0: out of memory for the decomposition of 20 x 20 matrices"):
        decompositions.eigh(symmetric(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize(("told", "problem"), [("cuda", "no CUDA device"), ("tpu", "unknown")])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    told: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llamas: Path, recipe_in: Any
) -> None:
    monkeypatch.setenv(decompositions.PLACE, told)
    recipe = recipe_in(llamas, {"a": ("a", 1.0)}, {"method": "dg_hard"})
    with pytest.raises(UsageError, match=f"KTMERGE_DECOMPOSE_ON={told}: {problem}"):
        blend(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lock_and_record_say_where_they_were_made(
    elsewhere: str, tmp_path: Path, llamas: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(llamas, {"a": ("a", 1.0)}, {"method": "dg_hard"})
    there = blend(recipe, tmp_path / "there")
    monkeypatch.delenv(decompositions.PLACE)
    here = blend(recipe, tmp_path / "here")
    assert there.out == here.out  # the device is the CPU
    told = [json.loads((tmp_path / out / "ktmerge.json").read_text())["versions"] for out in ("there", "here")]
    assert told[0].pop("decompositions") == "on cpu:0"
    assert told[0] == told[1]
