"""Going on where a killed writer stopped: what is trusted, what is made again, what is said about it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.journal import FILE, Journal, Remains, read_journal
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import KtmergeError

MakeCheckpoint = Callable[..., Path]

PIN = {"recipe": {"lambda": 0.1, "experts": ["a", "b"]}, "seed": 7}
NAMES = [f"layer.{number}.weight" for number in range(6)]

# Writes a checkpoint's first tensors with a journal, in pieces, and dies by SIGKILL in the middle of the next.
VICTIM = """
import json, os, signal, sys
from pathlib import Path
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.writer import Writer

base, out, count, pin = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
with Writer(out, overwrite=True, pin=pin, resume=True) as writer, base.reader() as reader:
    writer.plan_like(base)
    writer.add_text("config.json", "half a conf")
    for name in list(base.tensors)[:count]:
        data = b"".join(bytes(block) for block in reader.blocks(name))
        for start in reversed(range(0, len(data), 1000)):
            writer.write_bytes(name, data[start : start + 1000], start)
        writer.finish(name, {"name": name, "norm": 0.1 + 0.2})
    writer.write_bytes(list(base.tensors)[count], b"x" * 10, 3)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(make_checkpoint: MakeCheckpoint) -> Path:
    numbers = np.random.default_rng(0)
    tensors = {name: numbers.standard_normal((40, 33)).astype(np.float32) for name in NAMES}
    return make_checkpoint("base", tensors, shards=2, files={"tokenizer.json": "{}"})


def kill(base: Path, out: Path, count: int, pin: dict[str, Any] = PIN) -> Path:
    """Let a writer die after ``count`` tensors; the folder it leaves."""
    done = subprocess.run([sys.executable, "-c", VICTIM, str(base), str(out), str(count), json.dumps(pin)])
    assert done.returncode == -signal.SIGKILL
    (folder,) = out.parent.glob(f".{out.name}.ktmerge-*")
    return folder


def go_on(
    base: Path, out: Path, *, pin: dict[str, Any] | None = PIN, resume: bool = True
) -> tuple[list[str], list[str]]:
    """Write the checkpoint, skipping what is there; return which tensors were skipped, and the notes."""
    checkpoint = Checkpoint.open(base)
    skipped = []
    with Writer(out, pin=pin, resume=resume) as writer, checkpoint.reader() as reader:
        writer.plan_like(checkpoint)
        for name in checkpoint.tensors:
            report = writer.finished(name)
            if report is not None:
                assert report == {"name": name, "norm": 0.1 + 0.2}
                skipped.append(name)
                continue
            writer.write_bytes(name, b"".join(bytes(block) for block in reader.blocks(name)))
            writer.finish(name, {"name": name, "norm": 0.1 + 0.2})
        digests = writer.digests()
        writer.copy_files(checkpoint)
    assert digests == {file: sha256(out / file) for file in checkpoint.weight_files}
    return skipped, writer.notes


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_equal(base: Path, out: Path) -> None:
    """Every byte as it would have been without a kill, and nothing beside it."""
    assert sorted(os.listdir(out)) == sorted(os.listdir(base))
    for path in base.iterdir():
        if path.name != "model.safetensors.index.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.every(3)
@pytest.mark.parametrize("count", [0, 3, 5])
def test_goes_on_where_a_killed_run_stopped(base: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "place" / "out"
    kill(base, out, count)
    assert not out.exists()
    skipped, notes = go_on(base, out)
    assert skipped == NAMES[:count]
    assert notes == [f"going on with an interrupted run, which finished {count} tensors"]
    check_equal(base, out)


@pytest.mark.slow
def test_killed_again_and_again(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    for count in (1, 2, 4):
        kill(base, out, count)
    assert go_on(base, out)[0] == NAMES[:4]
    check_equal(base, out)


@pytest.mark.slow
def test_damaged_bytes_are_made_again(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    folder = kill(base, out, 5)
    info = Checkpoint.open(base).tensors[NAMES[1]]
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.end - 1)
        last = stream.read(1)
        stream.seek(info.end - 1)
        stream.write(bytes([last[0] ^ 1]))
    assert go_on(base, out)[0] == [NAMES[0], *NAMES[2:5]]
    check_equal(base, out)


@pytest.mark.every(3)
@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_damaged_file_is_made_again(base: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "place" / "out"
    folder = kill(base, out, 5)
    shard = folder / Checkpoint.open(base).weight_files[0]
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size + (1000 if damage == "long" else -(40 * 33 * 4)))
    expected = {"missing": NAMES[3:5], "short": [*NAMES[:2], *NAMES[3:5]], "long": NAMES[:5]}
    assert go_on(base, out)[0] == expected[damage]
    check_equal(base, out)


def test_torn_and_damaged_lines_are_passed_over(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    folder = kill(base, out, 5)
    lines = (folder / FILE).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"0.3", b"0.4", 1)
    lines[5] = lines[5][:-20]
    (folder / FILE).write_bytes(b"".join(lines))
    remains = read_journal(folder)
    assert remains is not None
    assert list(remains.entries) == [NAMES[0], NAMES[2], NAMES[3]]
    assert go_on(base, out)[0] == [NAMES[0], NAMES[2], NAMES[3]]
    check_equal(base, out)


@pytest.mark.every(3)
@pytest.mark.parametrize("text", [b"", b"\0" * 4096, b"{}\n", b"0123456789abcdef {}\n", "é\n".encode("latin-1")])
def test_a_journal_that_is_none_is_not_believed(base: Path, tmp_path: Path, text: bytes) -> None:
    out = tmp_path / "place" / "out"
    folder = kill(base, out, 5)
    (folder / FILE).write_bytes(text)
    skipped, notes = go_on(base, out)
    assert skipped == []
    assert notes == ["starting from the beginning: no interrupted run of this output left anything finished"]
    check_equal(base, out)


@pytest.mark.slow
def test_another_pin_starts_from_the_beginning(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    kill(base, out, 3, {**PIN, "seed": 8})
    skipped, notes = go_on(base, out)
    assert skipped == []
    assert notes == ["starting from the beginning: what an interrupted run left differs in seed; it is removed"]
    check_equal(base, out)


def test_without_resume_the_remains_are_removed(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    kill(base, out, 3)
    skipped, notes = go_on(base, out, resume=False)
    assert skipped == []
    assert notes == ["removed what an interrupted run left (3 finished tensors); --resume goes on with such"]
    check_equal(base, out)
    assert go_on(base, tmp_path / "place" / "other")[1] == [
        "starting from the beginning: no interrupted run of this output left anything finished"
    ]


def test_what_a_living_run_writes_is_left_alone(base: Path, tmp_path: Path) -> None:
    """A run that is still at work holds its folder; a second one starts from the beginning beside it."""
    out = tmp_path / "out"
    script = VICTIM.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('here', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", script, str(base), str(out), "3", '{"seed": 7}']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == "here\n"
        assert go_on(base, out, pin={"seed": 7})[0] == []
        assert (tmp_path / f".out.ktmerge-{living.pid}" / FILE).exists()
        living.kill()


def stop(base: Path, out: Path, error: type[BaseException], resume: bool) -> None:
    checkpoint = Checkpoint.open(base)
    with Writer(out, pin=PIN, resume=resume) as writer, checkpoint.reader() as reader:
        writer.plan_like(checkpoint)
        for name in NAMES[:2]:
            writer.write_bytes(name, b"".join(bytes(block) for block in reader.blocks(name)))
            writer.finish(name, {"name": name, "norm": 0.1 + 0.2})
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, KtmergeError])
@pytest.mark.parametrize("resume", [True, False])
def test_only_an_interrupted_resumable_run_leaves_something(
    base: Path, tmp_path: Path, error: type[BaseException], resume: bool
) -> None:
    out = tmp_path / "place" / "out"
    with pytest.raises(error):
        stop(base, out, error, resume)
    if resume and error is KeyboardInterrupt:
        assert go_on(base, out)[0] == NAMES[:2]
    else:
        assert not out.parent.exists()


@pytest.mark.every(2)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_taken_over_is_not_lost_by_an_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    out = tmp_path / "place" / "out"
    kill(base, out, 4)

    def refuse(*_: object) -> None:
        raise KtmergeError("too little room")

    with monkeypatch.context() as patch:
        patch.setattr("ktmerge.checkpoints.staging.Staging.require_space", refuse)
        with pytest.raises(KtmergeError, match="too little room"):
            go_on(base, out)
    with pytest.raises(error):
        stop(base, out, error, resume=True)
    assert go_on(base, out)[0] == NAMES[:4]
    check_equal(base, out)


@pytest.mark.every(2)
@pytest.mark.parametrize("cause", ["appeared", "rename", "interrupt"])
def test_what_was_taken_over_is_not_lost_at_the_very_last(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """Something else has appeared at the output, or the rename fails: all is there for the next run."""
    out = tmp_path / "place" / "out"
    kill(base, out, 4)

    def rename(*_: object) -> None:
        raise KeyboardInterrupt if cause == "interrupt" else OSError(errno.EACCES, "Permission denied")

    def last(*_: object, **__: object) -> None:
        if cause == "appeared":
            (out / "x").mkdir(parents=True)
        else:
            monkeypatch.setattr("ktmerge.checkpoints.staging.os.rename", rename)

    with monkeypatch.context() as patch:
        patch.setattr("ktmerge.checkpoints.writer.sync_tree", last)
        with pytest.raises((KtmergeError, KeyboardInterrupt)):
            go_on(base, out)
    monkeypatch.undo()
    shutil.rmtree(out, ignore_errors=True)
    assert go_on(base, out)[0] == NAMES
    check_equal(base, out)


def test_an_interrupt_while_publishing_leaves_nothing_old(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the exchange the temporary name is the old output's: it must go, whatever happens."""
    out = tmp_path / "place" / "out"
    go_on(base, out)
    checkpoint = Checkpoint.open(base)
    (out / "stale.txt").write_text("old")

    def sync(folder: Path) -> None:
        if folder == out.parent:
            raise KeyboardInterrupt

    def again() -> None:
        with Writer(out, overwrite=True, pin=PIN, resume=True) as writer, checkpoint.reader() as reader:
            writer.plan_like(checkpoint)
            for name in NAMES:
                writer.write_bytes(name, b"".join(bytes(block) for block in reader.blocks(name)))
            writer.copy_files(checkpoint)

    monkeypatch.setattr("ktmerge.checkpoints.staging._sync_folder", sync)
    monkeypatch.setattr("ktmerge.checkpoints.writer.sync_tree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        again()
    check_equal(base, out)


def test_tensors_that_the_kernel_copied_or_that_have_gaps_are_not_written_down(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(base)

    def begin() -> None:
        with Writer(tmp_path / "out", pin=PIN, resume=True) as writer, checkpoint.reader() as reader:
            writer.plan_like(checkpoint)
            place = reader.place(NAMES[0])
            assert place is not None
            writer.copy_range(NAMES[0], *place)
            writer.finish(NAMES[0], {})
            writer.write_bytes(NAMES[1], b"x" * 100)
            writer.finish(NAMES[1], {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    remains = read_journal(next(tmp_path.glob(".out.*")))
    assert remains is not None
    assert remains.pin == PIN
    assert remains.entries == {}


@pytest.mark.slow
def test_the_room_for_a_resumed_run_is_what_is_missing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ktmerge.checkpoints.staging.Staging.require_space", lambda _, needed: asked.append(needed))
    go_on(base, tmp_path / "one")
    kill(base, tmp_path / "two", 3)
    go_on(base, tmp_path / "two")
    assert asked[0] - asked[1] >= Checkpoint.open(base).nbytes


def test_lines_of_many_small_tensors_wait_for_one_another_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: calls.append(len(data)) or write(descriptor, data))
    journal = Journal(tmp_path, Remains(PIN, {}))
    for number in range(1, 2001):
        journal.wrote(f"tensor.{number}", 0, memoryview(b"abcd"))
        journal.finish(f"tensor.{number}", 4, {"norm": number})
        left = read_journal(tmp_path) if number in (1, 10, 64, 700, 2000) else None
        assert left is None or len(left.entries) >= number - number // 64
    assert len(calls) < 400
    journal.close()
    remains = read_journal(tmp_path)
    assert remains is not None
    assert {name: entry.report["norm"] for name, entry in remains.entries.items()} == {
        f"tensor.{number}": number for number in range(1, 2001)
    }


def test_a_large_tensor_is_written_down_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Remains(PIN, {}))
    for number in range(500):
        journal.wrote(f"small.{number}", 0, memoryview(b"abcd"))
        journal.finish(f"small.{number}", 4, {})
    journal.wrote("large", 0, memoryview(bytes(8 << 20)))
    journal.finish("large", 8 << 20, {})
    remains = read_journal(tmp_path)
    journal.close()
    assert remains is not None
    assert len(remains.entries) == 501
