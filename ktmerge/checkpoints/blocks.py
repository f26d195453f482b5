"""Large files written past the page cache: bytes gather in aligned blocks, and whole blocks go to the disk directly.

All of an output has to be on the disk before it appears. On its way there a fresh page of the page cache costs more
than most of the arithmetic that fills it, is filled under the file's lock, and takes the room of an input's page.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktmerge.checkpoints.files import write_all
from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.checkpoints.spans import Spans

LEAST = 64 << 20
"""Bytes from which a file is written this way: small ones are better kept in memory for whoever reads them next."""
SIZE = 2 << 20
"""Bytes of a block."""
HELD = 12
"""Blocks in memory at most, for all files of a writer together."""
NOTICE = 4 << 20
"""Whoever reads a file behind those who write it goes on whenever what has arrived passes a multiple of this."""
_ALIGNED = 4096
_CANNOT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})


class Block:
    """Some of the bytes ``[index SIZE, (index + 1) SIZE)`` of a file. Its pool's condition is held to change it."""

    def __init__(self, file: BlockFile, index: int, memory: memoryview) -> None:
        self.file, self.index, self.memory = file, index, memory
        self.start = index * SIZE
        self.length = min(SIZE, file.size - self.start)
        self.spans = Spans()
        self.users = 0
        self.is_queued = self.is_stored = self.is_read = False

    @property
    def is_whole(self) -> bool:
        return self.spans.count(0, self.length) == self.length

    @property
    def is_due(self) -> bool:
        """Whether someone is about to read it back, who waits for nothing else to arrive."""
        followed, prefix = self.file.followed, self.file.prefix
        if followed is None or prefix // NOTICE <= followed // NOTICE:
            return False
        return followed < self.start + self.length and self.start < min(prefix, followed + HELD * SIZE)


class Pool:
    """Memory for blocks, and one thread that stores them; a block stays in memory until it was read back as well, if
    there is room or that is about to happen: read from the disk it would come later than what is written meanwhile.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._free: list[memoryview] = []
        self._made = 0
        self._blocks: dict[Block, None] = {}  # oldest first
        self._queue: deque[Block] = deque()
        self._failure: OSError | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the thread; blocks that are not stored are lost."""
        with self.changed:
            self._stopped = True
            self.changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise OSError if something could not be stored. This and what follows: with ``changed`` held."""
        if self._failure is not None:
            raise OSError(self._failure.errno, self._failure.strerror)
        if self._stopped:
            raise OSError(errno.EBADF, "the output is closed")

    def make(self, file: BlockFile, index: int) -> Block | None:
        """An empty block; None if there is no room yet, which is to be waited for."""
        if self._thread is None:
            with uninterrupted():
                self._thread = threading.Thread(target=self._store, name="store", daemon=True)
                self._thread.start()
        if not self._free and self._made < HELD:
            self._made += 1
            self._free.append(memoryview(mmap.mmap(-1, SIZE)))
        idle = [block for block in self._blocks if not block.users and not block.is_queued] if not self._free else []
        if stored := [block for block in idle if block.is_stored and not block.is_due]:
            self.forget(max(stored, key=lambda block: block.start))  # files are read back from their beginning on
        if not self._free:
            if not self._queue and idle and not any(block.is_stored for block in idle):
                self.queue(idle[0])
            return None
        block = Block(file, index, self._free.pop())
        self._blocks[block] = None
        return block

    def queue(self, block: Block) -> None:
        """Have a block stored as it is."""
        block.is_queued = True
        self._queue.append(block)
        self.changed.notify_all()

    def forget(self, block: Block) -> None:
        """Take its memory back."""
        del self._blocks[block], block.file.blocks[block.index]
        self._free.append(block.memory)
        self.changed.notify_all()

    def _store(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                block = self._queue.popleft()
            failure = None
            try:
                block.file.store(block)
            except OSError as error:
                failure = error
            with self.changed:
                self._failure = self._failure or failure
                block.is_queued = False
                block.is_stored = True
                block.file.settled.add(block.index)
                if (block.is_read or not block.is_whole) and not block.users:
                    self.forget(block)
                self.changed.notify_all()


class BlockFile:
    """One file of a writer.

    Args:
        pool: of all its files.
        path: of the file, which is there and has its size.
        descriptor: by which the page cache is reached.
        size: bytes.

    Raises:
        OSError: the file cannot be opened for direct I/O; see `fits`.
    """

    def __init__(self, pool: Pool, path: Path, descriptor: int, size: int) -> None:
        self.size = size
        self.blocks: dict[int, Block] = {}
        self.settled: set[int] = set()  # blocks that were stored: more bytes for them go to the page cache
        self.prefix = 0  # bytes that have arrived without a gap, as its owner says
        self.followed: int | None = None  # how far it was read back, see `follow`
        self._pool = pool
        self._descriptor = descriptor
        self._direct: int | None = os.open(path, os.O_WRONLY | os.O_DIRECT)

    @staticmethod
    def open(pool: Pool, path: Path, descriptor: int, size: int) -> BlockFile | None:
        """A file as above; None if it is small, or neither system nor file system can do this."""
        if size < LEAST or not hasattr(os, "O_DIRECT"):
            return None
        try:
            return BlockFile(pool, path, descriptor, size)
        except OSError as error:
            if error.errno in _CANNOT:
                return None
            raise

    def write(self, data: memoryview, position: int) -> None:
        """Take ``data`` from ``position`` on.

        Raises:
            OSError: something could not be stored, now or before.
        """
        while data:
            index, offset = divmod(position, SIZE)
            piece = data[: SIZE - offset]
            block = self._claim(index)
            if block is None:
                write_all(self._descriptor, piece, position)
            else:
                try:
                    block.memory[offset : offset + len(piece)] = piece
                finally:
                    self._release(block, offset, offset + len(piece))
            data, position = data[len(piece) :], position + len(piece)

    @contextmanager
    def read(self, position: int, buffer: memoryview) -> Iterator[memoryview]:
        """Bytes from ``position`` on, which have arrived, at most as many as the buffer holds; in it or elsewhere.

        Raises:
            OSError: they cannot be read.
        """
        index, offset = divmod(position, SIZE)
        stop = min(SIZE, offset + len(buffer))
        with self._pool.changed:
            block = self.blocks.get(index)
            start, end = next(block.spans.ranges(offset, stop), (stop, stop)) if block is not None else (stop, stop)
            if start > offset or block is None:  # up to there they are not in memory any more
                block, end = None, start
            else:
                block.users += 1
        if block is None:
            yield buffer[: os.preadv(self._descriptor, [buffer[: end - offset]], position)]
            return
        try:
            yield block.memory[offset:end]
        finally:
            with self._pool.changed:
                block.is_read |= end == block.length
                self._leave(block)
                if block.is_read and block.is_stored and not block.users:
                    self._pool.forget(block)

    def follow(self, position: int | None) -> None:
        """Say how far someone who reads all of it as it arrives has come; None: nobody does any more."""
        with self._pool.changed:
            self.followed = position
            self._pool.changed.notify_all()

    def store(self, block: Block) -> None:
        """Bring a block to the disk if it is whole, or what there is of it to the page cache.

        Raises:
            OSError: it cannot be written.
        """
        done = 0
        if block.is_whole and block.length % _ALIGNED == 0:
            done = self._store_direct(block)
        for start, stop in block.spans.ranges(done, block.length):
            write_all(self._descriptor, block.memory[start:stop], block.start + start)

    def flush(self) -> None:
        """Bring everything to the disk or the page cache.

        Raises:
            OSError: something could not be written, now or before.
        """
        with self._pool.changed:
            while True:
                self._pool.check()
                waiting = [block for block in self.blocks.values() if not block.is_stored]
                if not waiting:
                    return
                for block in waiting:
                    if not block.is_queued and not block.users:
                        self._pool.queue(block)
                self._pool.changed.wait()

    def close(self) -> None:
        """Close what this opened; the pool is stopped."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _claim(self, index: int) -> Block | None:
        """The block to put bytes into; None if it was stored before, and they are for the page cache."""
        with self._pool.changed:
            while True:
                self._pool.check()
                block = self.blocks.get(index)
                if block is None and index in self.settled:
                    return None
                if block is None:
                    block = self._pool.make(self, index)
                    if block is not None:
                        self.blocks[index] = block
                if block is not None and block.is_stored:
                    if not block.users:
                        self._pool.forget(block)
                        return None
                elif block is not None and not block.is_queued:
                    block.users += 1
                    return block
                self._pool.changed.wait()

    def _release(self, block: Block, start: int, stop: int) -> None:
        with self._pool.changed:
            block.spans.add(start, stop)
            self._leave(block)

    def _leave(self, block: Block) -> None:
        """One user less; the last of a whole block, be it a reader, has it stored."""
        block.users -= 1
        if block.is_whole and not (block.users or block.is_queued or block.is_stored):
            self._pool.queue(block)
        self._pool.changed.notify_all()

    def _store_direct(self, block: Block) -> int:
        """How much of it went to the disk; the rest is for the page cache."""
        done = 0
        with _without_refusals():
            while self._direct is not None and done < block.length and done % _ALIGNED == 0:
                done += os.pwrite(self._direct, block.memory[done : block.length], block.start + done)
        return done


@contextmanager
def _without_refusals() -> Iterator[None]:
    """Nothing happens on a file that refuses direct I/O after all."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
