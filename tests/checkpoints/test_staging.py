"""Outputs appear whole or not at all: existing ones, killed runs, exchanges, what dead runs leave behind."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ktmerge.checkpoints import staging
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import KtmergeError, UsageError

MakeCheckpoint = Callable[..., Path]

# Copies a checkpoint without torch; stops for good at the step named in its third argument.
COPYIST = """
import sys, time
from pathlib import Path
from ktmerge.checkpoints import staging
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.writer import Writer

base, out, stop_at = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]

def step(name):
    if stop_at == name:
        print("stopped", flush=True)
        time.sleep(86400)

def stopping(name):
    whole = getattr(staging.Staging, name)
    def wrapped(self, *arguments, **named):
        step(name)
        return whole(self, *arguments, **named)
    setattr(staging.Staging, name, wrapped)

stopping("publish"), stopping("discard")
rounds = 10**9 if stop_at == "never" else 1
for _ in range(rounds):
    with Writer(out, overwrite=True) as writer, base.reader() as reader:
        step("open")
        writer.plan_like(base)
        step("plan")
        for position, name in enumerate(base.tensors):
            start = 0
            for block in reader.blocks(name):
                writer.write_bytes(name, block, start)
                start += len(block)
            if position == 2:
                step("write")
        writer.copy_files(base)
        step("copy")
    if stop_at == "never":
        print("round", flush=True)
step("end")
"""


@pytest.fixture
def copyist(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    script = tmp_path / "copyist.py"
    script.write_text(COPYIST)
    running: list[subprocess.Popen[str]] = []

    def start(base: Path, out: Path, stop_at: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(base), str(out), stop_at]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def write(
    base: Path, out: Path, overwrite: bool = False, before: Callable[[Writer], object] = lambda writer: None
) -> None:
    checkpoint = Checkpoint.open(base)
    with Writer(out, overwrite) as writer, checkpoint.reader() as reader:
        writer.plan_like(checkpoint)
        before(writer)
        for name in checkpoint.tensors:
            writer.write_bytes(name, b"".join(bytes(block) for block in reader.blocks(name)))
        writer.copy_files(checkpoint)


def digest(folder: Path) -> str:
    return Checkpoint.open(folder).content_digest()


@pytest.fixture
def old_and_new(make_checkpoint: MakeCheckpoint) -> tuple[Path, Path]:
    names = [f"layer.{i}.weight" for i in range(6)]
    old = make_checkpoint("old", {name: np.full((64, 64), 1, np.float32) for name in names})
    new = make_checkpoint("new", {name: np.full((64, 64), 2, np.float32) for name in names})
    return old, new


@pytest.mark.every(9)
@pytest.mark.parametrize("stop_at", ["open", "plan", "write", "copy", "publish", "discard", "end"])
@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_step(
    old_and_new: tuple[Path, Path], copyist: Callable[..., subprocess.Popen[str]], stop_at: str, existing: bool
) -> None:
    old, new = old_and_new
    out = old.parent / "place" / "out"
    out.parent.mkdir()
    if existing:
        write(old, out)
    process = copyist(new, out, stop_at)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    process.send_signal(signal.SIGKILL)
    process.wait()

    if stop_at in ("discard", "end"):
        assert digest(out) == digest(new)
    elif existing:
        assert digest(out) == digest(old)
    else:
        assert not out.exists()
    # The next run succeeds and clears away what the dead one left.
    write(new, out, overwrite=True)
    assert digest(out) == digest(new)
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.slow
def test_killed_at_random_moments(
    old_and_new: tuple[Path, Path], copyist: Callable[..., subprocess.Popen[str]]
) -> None:
    old, new = old_and_new
    out = old.parent / "place" / "out"
    write(old, out)
    generator = random.Random(0)
    for _ in range(8):
        process = copyist(new, out, "never")
        assert process.stdout is not None
        assert process.stdout.readline() == "round\n"
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        process.wait()
        assert digest(out) == digest(new)
        assert (out / "config.json").exists()
    write(old, out, overwrite=True)
    assert os.listdir(out.parent) == ["out"]


def test_terminated_by_a_signal_that_raises(make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint()
    before = os.listdir(base.parent)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(base, base.parent / "out", before=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert os.listdir(base.parent) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_folder_is_made_or_removed(
    old_and_new: tuple[Path, Path], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is heard when the call has done its work, and whoever made the folder knows of it."""
    old, new = old_and_new
    out = old.parent / "out"
    make, remove = Path.mkdir, staging.shutil.rmtree

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def making(path: Path, *arguments: object, **keywords: object) -> None:
        make(path, *arguments, **keywords)  # type: ignore[arg-type]
        if path.name.startswith(".out"):
            signal.raise_signal(number)

    def removing(path: Path, **keywords: object) -> None:
        signal.raise_signal(number)
        remove(path, **keywords)  # type: ignore[call-overload]

    def write_interrupted(*function: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(*function)  # type: ignore[arg-type]
            write(new, out, overwrite=True)

    write(old, out)
    before = sorted(os.listdir(out.parent))
    previous = signal.signal(number, interrupt)
    try:
        for function, found in [((Path, "mkdir", making), old), ((staging.shutil, "rmtree", removing), new)]:
            with pytest.raises(KeyboardInterrupt):
                write_interrupted(*function)
            assert sorted(os.listdir(out.parent)) == before
            assert digest(out) == digest(found)
    finally:
        signal.signal(number, previous)


# --- what may be replaced ---------------------------------------------------------------------------------------------


def test_existing_output_is_refused_at_once(make_checkpoint: MakeCheckpoint) -> None:
    base, out = make_checkpoint(), make_checkpoint("out")
    before = digest(out)
    with pytest.raises(UsageError, match=r"out: exists and is not empty; .*--overwrite"):
        Writer(out)
    assert digest(out) == before
    write(base, out, overwrite=True)
    assert sorted(os.listdir(base.parent)) == ["model", "out"]


def test_overwrite_replaces_everything(old_and_new: tuple[Path, Path]) -> None:
    old, new = old_and_new
    (old / "stale.json").write_text("{}")
    write(new, old, overwrite=True)
    assert digest(old) == digest(new)
    assert not (old / "stale.json").exists()


@pytest.mark.slow
def test_readers_never_find_a_gap(
    old_and_new: tuple[Path, Path], copyist: Callable[..., subprocess.Popen[str]]
) -> None:
    old, new = old_and_new
    out = old.parent / "place" / "out"
    write(old, out)
    process = copyist(new, out, "never")
    assert process.stdout is not None
    rounds = 0
    while rounds < 30:
        assert all((out / "config.json").exists() for _ in range(100))
        assert process.poll() is None
        rounds += len((os.read(process.stdout.fileno(), 1000) if ready(process) else b"").splitlines())


def ready(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0)[0])


def test_overwrite_replaces_only_checkpoints(make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint()
    precious = base.parent / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds files but no checkpoint"):
        Writer(precious, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        Writer(precious / "thesis.tex", overwrite=True)
    with pytest.raises(UsageError, match="lies below one"):
        Writer(precious / "thesis.tex" / "out")
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_a_name_without_room_for_the_temporary_folders_is_refused(tmp_path: Path) -> None:
    longest = tmp_path / ("é" * 117)
    with pytest.raises(KtmergeError, match="nothing was planned"), Writer(longest):
        pass
    with pytest.raises(UsageError, match="too long; choose one of at most 234 bytes"):
        Writer(longest.with_name(longest.name + "x"))


def test_an_empty_folder_is_filled(make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint()
    out = base.parent / "out"
    out.mkdir()
    write(base, out)
    assert digest(out) == digest(base)


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(UsageError, match="is a mount point"):
        Writer(Path("/proc"), overwrite=True)


def test_an_output_that_is_a_link_stays_a_link(old_and_new: tuple[Path, Path]) -> None:
    old, new = old_and_new
    link = old.parent / "latest"
    link.symlink_to(old)
    write(new, link, overwrite=True)
    assert link.is_symlink()
    assert digest(old) == digest(new)


def test_an_output_that_appears_meanwhile_is_kept(old_and_new: tuple[Path, Path]) -> None:
    old, new = old_and_new
    out = old.parent / "out"

    def appear(_: Writer) -> None:
        write(old, old.parent / "elsewhere")
        (old.parent / "elsewhere").rename(out)

    with pytest.raises(UsageError, match="exists and is not empty"):
        write(new, out, before=appear)
    assert digest(out) == digest(old)
    assert sorted(os.listdir(old.parent)) == ["new", "old", "out"]


def test_two_runs_at_once(make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint()
    out = base.parent / "out"

    def second(first: Writer) -> None:
        with pytest.raises(KtmergeError, match="another run is writing this output"):
            write(base, out)
        assert (first.folder / "model.safetensors").exists()

    write(base, out, before=second)
    assert digest(out) == digest(base)


def test_another_processes_folder_is_left_alone(
    make_checkpoint: MakeCheckpoint, copyist: Callable[..., subprocess.Popen[str]]
) -> None:
    base = make_checkpoint()
    out = base.parent / "place" / "out"
    process = copyist(base, out, "write")
    assert process.stdout is not None
    process.stdout.readline()
    theirs = out.parent / f".out.ktmerge-{process.pid}"
    assert theirs.is_dir()
    write(base, out)
    assert theirs.is_dir()
    assert digest(out) == digest(base)


def test_only_dead_runs_of_the_same_output_are_cleared(make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint()
    place = base.parent / "place"
    names = [".out.ktmerge-1", f".out.ktmerge-{os.getpid()}", ".outer.ktmerge-1", ".out.ktmerge-x", "out.ktmerge-1"]
    for name in names:
        (place / name / "sub").mkdir(parents=True)
    write(base, place / "out")
    assert sorted(os.listdir(place)) == [".out.ktmerge-x", ".outer.ktmerge-1", "out", "out.ktmerge-1"]


def test_names_with_pattern_characters(make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint()
    write(base, base.parent / "place" / "a[1] (b)*.x")
    assert os.listdir(base.parent / "place") == ["a[1] (b)*.x"]


# --- file systems that can do less ------------------------------------------------------------------------------------


class NoLibrary:
    """A C library without Linux's own calls."""


def test_without_exchange(old_and_new: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = old_and_new
    monkeypatch.setattr(staging, "_libc", NoLibrary)
    write(new, old, overwrite=True)
    assert digest(old) == digest(new)
    assert sorted(os.listdir(old.parent)) == ["new", "old"]


def test_without_exchange_a_failed_rename_puts_the_old_back(
    old_and_new: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = old_and_new
    before, whole = digest(old), os.rename
    monkeypatch.setattr(staging, "_libc", NoLibrary)

    def failing(source: Path, target: Path) -> None:
        if Path(target) == old and "-old" not in str(source):
            raise OSError(5, "Input/output error")
        whole(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(KtmergeError, match="Input/output error"):
        write(new, old, overwrite=True)
    assert digest(old) == before
    assert sorted(os.listdir(old.parent)) == ["new", "old"]


def test_a_run_that_died_in_the_gap_gives_the_old_output_back(old_and_new: tuple[Path, Path]) -> None:
    old, new = old_and_new
    before = digest(old)
    old.rename(old.parent / ".old.ktmerge-1-old")
    with pytest.raises(UsageError, match="exists"):
        write(new, old)
    assert digest(old) == before


def test_reserving_fails_early(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as stream:
        staging.preallocate(stream.fileno(), 4096)
        assert os.fstat(stream.fileno()).st_size == 4096
        with pytest.raises(OSError, match=r"No space|too large"):
            staging.preallocate(stream.fileno(), 1 << 60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(
    make_checkpoint: MakeCheckpoint, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tensors={"w": np.ones((512, 1024), np.float32)})
    with pytest.raises(KtmergeError, match="GB are free"):
        write(base, small_disk / "out")
    monkeypatch.setattr(staging.Staging, "require_space", lambda *_: None)
    with pytest.raises(KtmergeError, match="the disk is full"):
        write(base, small_disk / "out")
    monkeypatch.setattr(staging, "_libc", NoLibrary)
    with pytest.raises(KtmergeError, match="the disk is full"):
        write(base, small_disk / "out")
    assert os.listdir(small_disk) == []
    save_file({"w": np.ones(4, np.float32)}, base / "model.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr("ktmerge.checkpoints.writer._SPARE", 0)
    write(base, small_disk / "out")
    assert os.listdir(small_disk) == ["out"]
