"""Files written past the page cache: right bytes in any order, in bounded memory, and errors that are not lost."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.checkpoints import blocks, follower, output
from ktmerge.checkpoints.blocks import BlockFile, Pool
from ktmerge.checkpoints.follower import Follower
from ktmerge.checkpoints.output import OutputFile
from ktmerge.errors import KtmergeError

SIZE = 8192
LENGTH = 21 * SIZE + 4096 + 77
"""Of the file: its last block is neither whole nor aligned."""


@pytest.fixture
def data() -> memoryview:
    return np.random.default_rng(0).integers(1, 255, LENGTH, dtype=np.uint8).data


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(blocks, "LEAST", 1)
    monkeypatch.setattr(blocks, "SIZE", SIZE)
    monkeypatch.setattr(blocks, "HELD", 4)
    path = tmp_path / "file"
    path.write_bytes(bytes(LENGTH))
    return path


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture
def file(path: Path, pool: Pool) -> Iterator[BlockFile]:
    descriptor = os.open(path, os.O_RDWR)
    file = BlockFile.open(pool, path, descriptor, LENGTH)
    if file is None:
        pytest.skip("no direct I/O here")
    yield file
    pool.stop()
    file.close()
    os.close(descriptor)


def write(file: BlockFile, data: memoryview, starts: list[int], size: int, threads: int = 1) -> None:
    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(lambda start: file.write(data[start : start + size], start), starts))


@pytest.mark.parametrize("size", [700, SIZE, 3 * SIZE + 5])
@pytest.mark.parametrize("order", ["forwards", "backwards", "random"])
def test_any_order_and_size(file: BlockFile, data: memoryview, path: Path, order: str, size: int) -> None:
    starts = list(range(0, LENGTH, size))
    if order == "random":
        starts = [starts[i] for i in np.random.default_rng(1).permutation(len(starts))]
    write(file, data, starts if order != "backwards" else starts[::-1], size, threads=4)
    file.flush()
    assert path.read_bytes() == bytes(data)


def test_whole_blocks_go_to_the_disk_and_the_rest_through_the_cache(
    file: BlockFile, data: memoryview, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = os.pwrite, []

    def watched(descriptor: int, piece: Any, position: int) -> int:
        seen.append((descriptor == file._descriptor, position, len(piece)))
        return whole(descriptor, piece, position)

    monkeypatch.setattr(os, "pwrite", watched)
    write(file, data, [0, 2 * SIZE, 20 * SIZE], 2 * SIZE - 100)  # then what is missing of two of them
    file.write(data[4 * SIZE - 100 : 4 * SIZE], 4 * SIZE - 100)
    file.write(data[21 * SIZE :], 21 * SIZE)
    file.flush()
    direct = {position for cached, position, _ in seen if not cached}
    assert direct == {0, 2 * SIZE, 3 * SIZE, 20 * SIZE}
    assert {(position, size) for cached, position, size in seen if cached} >= {(SIZE, SIZE - 100)}
    found = path.read_bytes()
    assert found[: 2 * SIZE - 100] == bytes(data[: 2 * SIZE - 100])
    assert found[2 * SIZE : 4 * SIZE] == bytes(data[2 * SIZE : 4 * SIZE])
    assert found[20 * SIZE :] == bytes(data[20 * SIZE :])
    assert not any(found[4 * SIZE : 20 * SIZE])


def test_memory_is_bounded(file: BlockFile, data: memoryview, path: Path, pool: Pool) -> None:
    """Begun blocks are put away half full when there are too many of them."""
    for offset in (0, SIZE // 2):
        for index in range(21):
            start = index * SIZE + offset
            file.write(data[start : start + SIZE // 2], start)
            assert len(file.blocks) <= 4
    file.write(data[21 * SIZE :], 21 * SIZE)
    file.flush()
    assert path.read_bytes() == bytes(data)
    assert pool._made <= 4


@pytest.mark.parametrize("flushed", [True, False])
def test_what_is_written_again_counts(file: BlockFile, data: memoryview, path: Path, flushed: bool) -> None:
    write(file, memoryview(bytes(LENGTH)), [0], LENGTH)
    if flushed:
        file.flush()
    write(file, data, list(range(0, LENGTH, 999)), 999, threads=3)
    file.flush()
    assert path.read_bytes() == bytes(data)


def test_reads_what_is_in_memory_and_what_is_not(file: BlockFile, data: memoryview) -> None:
    buffer, found, position = memoryview(bytearray(3 * SIZE)), bytearray(), 0
    for start in range(0, LENGTH, 5000):
        file.write(data[start : start + 5000], start)
        if start % 3 == 0:
            while position < min(start + 5000, LENGTH):
                with file.read(position, buffer[: min(start + 5000, LENGTH) - position]) as piece:
                    found += piece
                    position += len(piece)
    assert found == data[: len(found)]
    assert len(found) > LENGTH - 20_000


def test_a_block_that_is_completed_while_it_is_read_is_stored_then(
    file: BlockFile, data: memoryview, pool: Pool
) -> None:
    half = SIZE // 2
    file.write(data[:half], 0)
    with file.read(0, memoryview(bytearray(half))):
        file.write(data[half:SIZE], half)
    with pool.changed:
        assert pool.changed.wait_for(lambda: 0 in file.settled, 5)


def test_what_is_read_back_last_makes_room(file: BlockFile, data: memoryview, pool: Pool) -> None:
    for index in range(4):
        file.write(data[index * SIZE : (index + 1) * SIZE], index * SIZE)
    with pool.changed:
        assert pool.changed.wait_for(lambda: len(file.settled) == 4, 5)
    file.write(data[4 * SIZE : 5 * SIZE], 4 * SIZE)
    assert set(file.blocks) == {0, 1, 2, 4}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_is_said_to_whoever_writes_next(
    file: BlockFile, data: memoryview, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", failing)
    file.write(data[:SIZE], 0)
    with pytest.raises(OSError, match=os.strerror(code)):
        file.flush()


def refusing(call: Callable[..., int], refused: Callable[..., bool]) -> Callable[..., int]:
    def chosen(*arguments: Any) -> int:
        if refused(*arguments):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(*arguments)

    return chosen


def test_a_file_system_that_refuses_late_gets_it_through_the_cache(
    file: BlockFile, data: memoryview, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite, lambda descriptor, *_: descriptor == file._direct))
    write(file, data, [0], LENGTH)
    file.flush()
    assert path.read_bytes() == bytes(data)


def test_a_file_system_that_refuses_at_once_is_written_as_ever(
    path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", refusing(os.open, lambda _, flags: bool(flags & os.O_DIRECT)))
    assert BlockFile.open(pool, path, 0, LENGTH) is None


def test_small_files_are_written_as_ever(path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LEAST", LENGTH + 1)
    assert BlockFile.open(pool, path, 0, LENGTH) is None


def test_whoever_waits_for_room_hears_that_the_end_has_come(
    file: BlockFile, data: memoryview, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, heard = threading.Event(), []
    whole = os.pwrite

    def stuck(descriptor: int, piece: Any, position: int) -> int:
        going.wait(5)
        return whole(descriptor, piece, position)

    monkeypatch.setattr(os, "pwrite", stuck)

    def fill() -> None:
        try:
            file.write(data, 0)
        except OSError as error:
            heard.append(error.strerror)

    writing = threading.Thread(target=fill)
    writing.start()
    while len(file.blocks) < 4:
        pass
    threading.Timer(0.05, going.set).start()
    pool.stop()
    writing.join(5)
    assert heard == ["the output is closed"]


class SlowHash:
    """Much slower than whoever writes; on a disk that is gone."""

    def __init__(self, works: bool) -> None:
        self._hash, self._works = hashlib.new("sha256"), works

    def update(self, data: memoryview) -> None:
        time.sleep(0.001)
        if not self._works:
            raise OSError(errno.EIO, "Input/output error")
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@pytest.mark.parametrize("works", [True, False])
def test_what_writes_waits_for_who_reads_behind_it_while_someone_does(
    path: Path, pool: Pool, data: memoryview, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    for module in (blocks, follower, output):
        monkeypatch.setattr(module, "NOTICE", 2 * SIZE)
    monkeypatch.setattr(follower.hashlib, "sha256", lambda: SlowHash(works))
    from_disk: list[int] = []
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *where: from_disk.append(where[2]) or read(*where))
    arrived = threading.Condition()
    file = OutputFile(path, path, LENGTH, arrived, pool)
    behind = Follower({"file": file}, arrived)
    for start in range(0, LENGTH, 999):
        file.write(data[start : start + 999], start)
    if works:
        assert behind.digests()["file"] == hashlib.new("sha256", data).hexdigest()
        assert from_disk == []
    else:
        with pytest.raises(KtmergeError, match="cannot be read back: Input/output error"):
            behind.digests()
    behind.stop()
    file.flush()
    assert path.read_bytes() == bytes(data)
    pool.stop()
    file.close()
