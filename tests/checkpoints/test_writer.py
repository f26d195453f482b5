"""The writer: right bytes at right places, and an output folder that appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ktmerge.checkpoints import blocks
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.header import FilePlan
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import KtmergeError, UsageError

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(autouse=True, params=["cached", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files through the page cache, as small ones are, or past it in blocks."""
    if request.param == "direct":
        monkeypatch.setattr(blocks, "LEAST", 1)
        monkeypatch.setattr(blocks, "SIZE", 8192)
        monkeypatch.setattr(blocks, "HELD", 3)
    return str(request.param)


def copy(base: Checkpoint, writer: Writer) -> None:
    with base.reader() as reader:
        for name in base.tensors:
            writer.write(name, reader.read(name))


def attempt(base: Checkpoint, out: Path, *work: Callable[[Writer], object]) -> None:
    """Plan ``base`` into ``out`` and do the work."""
    with Writer(out) as writer:
        writer.plan_like(base)
        for step in work:
            step(writer)


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("shards", [1, 3])
def test_mirrors_a_checkpoint(make_checkpoint: MakeCheckpoint, shards: int) -> None:
    root = make_checkpoint(shards=shards, files={"tokenizer.json": "{}", "code/model.py": "pass", ".cache": "x"})
    base = Checkpoint.open(root)
    out = root.parent / "new" / "out"
    with Writer(out) as writer:
        writer.plan_like(base)
        copy(base, writer)
        assert writer.copy_files(base) == ["code/model.py", "config.json", "tokenizer.json"]
        writer.add_text("ktmerge.json", "{}")
        assert not out.exists()
    result = Checkpoint.open(out)
    assert result.tensors == base.tensors
    assert result.content_digest() == base.content_digest()
    assert result.weight_files == base.weight_files
    assert result.metadata == base.metadata
    assert set(result.other_files) == set(base.other_files)
    assert (out / "ktmerge.json").read_text() == "{}"
    for file in base.weight_files:
        assert (out / file).read_bytes() == (root / file).read_bytes()
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == base.nbytes
        assert index["weight_map"] == {name: info.file for name, info in base.tensors.items()}
    assert listing(out.parent) == ["out"]


def test_another_type(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint(shards=2))
    out = base.root.parent / "out"
    with Writer(out) as writer, base.reader() as reader:
        writer.plan_like(base, dtypes=dict.fromkeys(base.tensors, "BF16"))
        for name in base.tensors:
            writer.write(name, reader.read(name).to(torch.bfloat16))
    for file in base.weight_files:
        expected = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base.root / file).items()}
        found = load_file(out / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_chunks_from_many_threads_in_any_order(make_checkpoint: MakeCheckpoint) -> None:
    tensors = {"big": torch.arange(10_007, dtype=torch.int32), "small": torch.ones(3)}
    root = make_checkpoint()
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    base = Checkpoint.open(root)
    out = root.parent / "out"
    starts = list(range(0, 10_007, 100))
    generator = torch.Generator().manual_seed(0)
    order = [starts[i] for i in torch.randperm(len(starts), generator=generator).tolist()]
    with Writer(out) as writer, ThreadPoolExecutor(8) as pool:
        writer.plan_like(base)
        writer.write("small", tensors["small"])
        list(pool.map(lambda start: writer.write("big", tensors["big"][start : start + 100], start), order))
        writer.write("big", tensors["big"][50:250], 50)  # the same bytes again are no harm
    assert (out / "model.safetensors").read_bytes() == (root / "model.safetensors").read_bytes()


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "strided": torch.arange(6.0).reshape(2, 3).t(),
        "graph": torch.ones(2, requires_grad=True),
    }
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    (tmp_path / "base").mkdir()
    save_file(stored, tmp_path / "base" / "model.safetensors")
    base = Checkpoint.open(tmp_path / "base")
    with Writer(tmp_path / "out") as writer:
        writer.plan_like(base)
        for name, tensor in tensors.items():
            if name == "fp8":
                writer.write_bytes(name, tensor.view(torch.uint8).numpy().tobytes())
            else:
                writer.write(name, tensor)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in stored.items())
    assert found["strided"].shape == (3, 2)


def test_added_texts_win_over_carried_files(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint(files={"README.md": "old"}))
    out = base.root.parent / "out"
    with Writer(out) as writer:
        writer.plan_like(base)
        copy(base, writer)
        writer.add_text("config.json", '{"dtype": "float32"}')
        assert writer.copy_files(base, skip={"README.md"}) == []
    assert Checkpoint.open(out).config == {"dtype": "float32"}
    assert listing(out) == ["config.json", "model.safetensors"]


def test_permissions_follow_the_umask(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint(files={"secret.txt": "x"}))
    (base.root / "secret.txt").chmod(0o600)
    old = os.umask(0o022)
    try:
        with Writer(base.root.parent / "out") as writer:
            writer.plan_like(base)
            copy(base, writer)
            writer.copy_files(base)
            writer.add_text("note.txt", "x")
    finally:
        os.umask(old)
    for file in (base.root.parent / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
    assert stat.S_IMODE((base.root.parent / "out").stat().st_mode) == 0o755


# --- nothing half-written ---------------------------------------------------------------------------------------------


def check_nothing_new(parent: Path, before: list[str]) -> None:
    assert listing(parent) == before, "something was left behind"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing(make_checkpoint: MakeCheckpoint, error: type[BaseException]) -> None:
    base = Checkpoint.open(make_checkpoint())
    before = listing(base.root.parent)

    def fail(writer: Writer) -> None:
        copy(base, writer)
        raise error

    with pytest.raises(error):
        attempt(base, base.root.parent / "runs" / "a" / "out", fail)
    check_nothing_new(base.root.parent, before)


@pytest.mark.parametrize("begun", [0, 1])
def test_a_signal_while_a_thread_begins_leaves_nothing(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    base = Checkpoint.open(make_checkpoint())
    before, real = listing(base.root.parent), threading.Thread.start
    threads: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        threads.append(thread)
        if len(threads) == begun + 1:
            os.kill(os.getpid(), signal.SIGINT)  # on a busy machine it comes while the thread is waited for
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        attempt(base, base.root.parent / "out", lambda writer: copy(base, writer))
    assert not any(thread.is_alive() for thread in threads)
    check_nothing_new(base.root.parent, before)


def test_unwritten_tensors_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint())
    before = listing(base.root.parent)

    def most(writer: Writer) -> None:
        with base.reader() as reader:
            for name in base.tensors:
                writer.write(name, reader.read(name, 0, 2 if name == "model.norm.weight" else None))

    with pytest.raises(KtmergeError, match=r"'model\.norm\.weight': only 8 of its 16 bytes were written"):
        attempt(base, base.root.parent / "out", most)
    check_nothing_new(base.root.parent, before)


def test_an_empty_run_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KtmergeError, match="nothing was planned"), Writer(tmp_path / "out"):
        pass
    check_nothing_new(tmp_path, [])


@pytest.mark.parametrize("way", ["cached"], indirect=True)
def test_a_header_damaged_on_disk_is_noticed(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint())
    before = listing(base.root.parent)

    def damage(writer: Writer) -> None:
        copy(base, writer)
        with (writer.folder / "model.safetensors").open("r+b") as stream:
            stream.seek(20)
            stream.write(b"\0")

    with pytest.raises(KtmergeError, match="does not read back") as caught:
        attempt(base, base.root.parent / "out", damage)
    assert not isinstance(caught.value, UsageError)
    check_nothing_new(base.root.parent, before)


@pytest.mark.parametrize("way", ["cached"], indirect=True)
def test_a_renamed_tensor_on_disk_is_noticed(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint())

    def rename(writer: Writer) -> None:
        copy(base, writer)
        path = writer.folder / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.nurm.weight"))

    with pytest.raises(KtmergeError, match="header differs from the plan at"):
        attempt(base, base.root.parent / "out", rename)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, "Input/output error")],
)
def test_write_errors_are_clear(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, way: str, code: int, reason: str
) -> None:
    base = Checkpoint.open(make_checkpoint())
    before = listing(base.root.parent)
    whole, calls = os.pwrite, []

    def failing(descriptor: int, data: Any, position: int) -> int:
        calls.append(position)
        if len(calls) > (3 if way == "cached" else 0):
            raise OSError(code, os.strerror(code))
        return whole(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(KtmergeError, match=reason) as caught:
        attempt(base, base.root.parent / "out", lambda writer: copy(base, writer))
    assert str(base.root.parent / "out") in str(caught.value)
    check_nothing_new(base.root.parent, before)


def test_short_writes_are_continued(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Checkpoint.open(make_checkpoint())
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: whole(fd, data[:7], position))
    with Writer(base.root.parent / "out") as writer:
        writer.plan_like(base)
        copy(base, writer)
    assert Checkpoint.open(base.root.parent / "out").content_digest() == base.content_digest()


def test_too_little_room_is_said_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.open(make_checkpoint())
    before = listing(base.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(KtmergeError, match=r"needs 0\.02 GB, but only 0\.00 GB are free"):
        attempt(base, base.root.parent / "out")
    check_nothing_new(base.root.parent, before)


@pytest.mark.parametrize("way", ["cached"], indirect=True)
def test_closing_waits_for_writes_under_way(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a late write would go to whatever file has got the descriptor's number by then."""
    base = Checkpoint.open(make_checkpoint())
    whole, entered, finished = os.pwrite, threading.Event(), []

    def slow(descriptor: int, data: Any, position: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            time.sleep(0.2)
            os.fstat(descriptor)
            finished.append(position)
        return whole(descriptor, data, position)

    def leave_early(writer: Writer) -> None:
        late = threading.Thread(target=writer.write, args=("model.norm.weight", torch.ones(4)))
        late.start()
        entered.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", slow)
    with pytest.raises(KeyboardInterrupt):
        attempt(base, base.root.parent / "out", leave_early)
    assert len(finished) == 1


def test_nothing_is_written_after_the_end(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint())
    with Writer(base.root.parent / "out") as writer:
        writer.plan_like(base)
        copy(base, writer)
    with pytest.raises(KtmergeError, match="is closed; nothing more can be written"):
        writer.write("model.norm.weight", torch.zeros(4))
    assert Checkpoint.open(base.root.parent / "out").content_digest() == base.content_digest()


# --- copies and digests -----------------------------------------------------------------------------------------------


def place_of(base: Checkpoint, name: str) -> tuple[Path, int, int]:
    info = base.tensors[name]
    return base.root / info.file, info.begin, info.end


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_the_kernel_copies_where_it_can(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    base = Checkpoint.open(make_checkpoint())
    whole = os.copy_file_range

    def short(source: int, target: int, count: int, start: int, position: int) -> int:
        if refusal is not None and start > place_of(base, "model.norm.weight")[1]:
            raise OSError(refusal, os.strerror(refusal))
        return whole(source, target, min(count, 5), start, position)

    monkeypatch.setattr(os, "copy_file_range", short)
    with Writer(base.root.parent / "out") as writer:
        writer.plan_like(base)
        for name in base.tensors:
            path, begin, end = place_of(base, name)
            with path.open("rb") as stream:
                copied = writer.copy_range(name, stream.fileno(), begin, end)
            assert copied is (refusal is None or name != "model.norm.weight")
            if not copied:
                writer.write_bytes(name, path.read_bytes()[begin:end])
    assert Checkpoint.open(base.root.parent / "out").content_digest() == base.content_digest()


def test_a_source_that_became_shorter_is_not_copied(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint())
    path, begin, end = place_of(base, "model.norm.weight")

    def copy_short(writer: Writer) -> None:
        os.truncate(path, end - 1)
        with path.open("rb") as stream:
            assert not writer.copy_range("model.norm.weight", stream.fileno(), begin, end)

    with pytest.raises(KtmergeError, match="bytes were written"):
        attempt(base, base.root.parent / "out", copy_short)


def test_a_copy_on_a_full_disk_is_clear(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Checkpoint.open(make_checkpoint())

    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(KtmergeError, match="the disk is full"):
        attempt(base, base.root.parent / "out", lambda writer: writer.copy_range("model.norm.weight", 0, 0, 16))


@pytest.mark.every(3)
@pytest.mark.parametrize("shards", [1, 3])
def test_digests_follow_what_is_written(make_checkpoint: MakeCheckpoint, shards: int) -> None:
    """Tensors of a megabyte in pieces, from the end to the beginning and from two threads."""
    values = np.random.default_rng(0).integers(0, 255, (5, 1 << 20), dtype=np.uint8)
    base = Checkpoint.open(make_checkpoint(tensors={f"t{i}": row for i, row in enumerate(values)}, shards=shards))
    out = base.root.parent / "out"
    with Writer(out) as writer, ThreadPoolExecutor(2) as pool:
        writer.plan_like(base)
        pieces = [(i, start) for i in range(5) for start in range(0, 1 << 20, 300_000)]
        list(
            pool.map(
                lambda p: writer.write_bytes(f"t{p[0]}", values[p[0]][p[1] : p[1] + 300_000].data, p[1]), pieces[::-1]
            )
        )
        digests = writer.digests()
    assert digests == {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in base.weight_files}


@pytest.mark.slow
def test_digests_are_of_what_was_written_last(make_checkpoint: MakeCheckpoint) -> None:
    values = np.random.default_rng(0).integers(0, 255, 9 << 20, dtype=np.uint8)
    base = Checkpoint.open(make_checkpoint(tensors={"t": values}))
    out = base.root.parent / "out"
    with Writer(out) as writer:
        writer.plan_like(base)
        writer.write_bytes("t", bytes(9 << 20))
        time.sleep(0.1)  # so that it is hashed
        writer.write_bytes("t", values.data)
        digests = writer.digests()
    assert digests == {"model.safetensors": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()}
    assert Checkpoint.open(out).content_digest() == base.content_digest()


def test_digests_of_what_is_incomplete_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    base = Checkpoint.open(make_checkpoint())
    with pytest.raises(KtmergeError, match="only 0 of its"):
        attempt(base, base.root.parent / "out", lambda writer: writer.digests())


@pytest.mark.parametrize("way", ["cached"], indirect=True)
def test_a_file_that_cannot_be_read_back_is_said(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.open(make_checkpoint())

    def broken(writer: Writer) -> None:
        copy(base, writer)
        writer.digests()

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", _only_in_threads(os.preadv, failing))
    with pytest.raises(KtmergeError, match="cannot be read back: Input/output error"):
        attempt(base, base.root.parent / "out", broken)


def _only_in_threads(whole: Callable[..., int], other: Callable[..., int]) -> Callable[..., int]:
    def chosen(*arguments: Any) -> int:
        return (whole if threading.current_thread() is threading.main_thread() else other)(*arguments)

    return chosen


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda writer: writer.write("ghost", torch.ones(1)), "'ghost' is not planned"),
        (lambda writer: writer.write("model.norm.weight", torch.ones(4).half()), "planned as F32, but F16 was given"),
        (lambda writer: writer.write("model.norm.weight", torch.ones(5)), "bytes 0 to 20 were given"),
        (lambda writer: writer.write("model.norm.weight", torch.ones(4), 1), "bytes 4 to 20 were given"),
        (lambda writer: writer.write("model.norm.weight", torch.ones(1), -1), "bytes -4 to 0 were given"),
        (lambda writer: writer.plan([]), "already planned"),
        (lambda writer: writer.copy_range("model.norm.weight", 0, 0, 15), "has 16 bytes; 15 were given"),
    ],
)
def test_misuse_is_refused(make_checkpoint: MakeCheckpoint, call: Callable[[Writer], None], reason: str) -> None:
    base = Checkpoint.open(make_checkpoint())
    with pytest.raises(KtmergeError, match=reason):
        attempt(base, base.root.parent / "out", call)


def test_a_tensor_in_two_files_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    info = Checkpoint.open(make_checkpoint()).tensors["model.norm.weight"]
    with (
        pytest.raises(KtmergeError, match="planned in two files"),
        Writer(make_checkpoint("second").parent / "out") as writer,
    ):
        writer.plan([FilePlan("a.safetensors", [info]), FilePlan("b.safetensors", [info])])
