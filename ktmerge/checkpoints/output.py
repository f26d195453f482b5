"""One file of known size that is written in pieces, from any thread, by the process or by the kernel."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ktmerge.checkpoints.blocks import NOTICE, BlockFile, Pool
from ktmerge.checkpoints.files import clear_os_errors, write_all
from ktmerge.checkpoints.journal import Entry
from ktmerge.checkpoints.spans import Spans
from ktmerge.checkpoints.staging import preallocate
from ktmerge.errors import KtmergeError

_KERNEL_COPY = 64 << 20
"""Bytes the kernel copies at a time, so that those who follow see them arrive and a signal is heard."""
_READ = 1 << 20
_CANNOT_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY})


class OutputFile:
    """A file being written, and which of its bytes have arrived. ``is_rewritten``: some have more than once.

    Args:
        path: where it is written; a file that an interrupted run left there keeps its bytes.
        shown: its name in messages.
        size: bytes; the room is reserved at once.
        arrived: notified when more of the file has arrived without a gap; shared by all files of a writer.
        pool: for what of a large file is on its way to the disk; shared likewise.

    Raises:
        KtmergeError: it cannot be made, or the disk is full.
    """

    def __init__(self, path: Path, shown: Path, size: int, arrived: threading.Condition, pool: Pool) -> None:
        self.size = size
        self.is_rewritten = False
        self._shown = shown
        self._arrived = arrived
        self._spans = Spans()
        self._writing = 0
        with clear_os_errors(shown):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(descriptor).st_size > size:
                    os.ftruncate(descriptor, size)
                preallocate(descriptor, size)
                self._blocks = BlockFile.open(pool, path, descriptor, size)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor: int | None = descriptor

    @property
    def prefix(self) -> int:
        """Bytes that have arrived without a gap from the beginning; to be asked with ``arrived`` held."""
        return self._spans.prefix

    @contextmanager
    def read(self, position: int, buffer: memoryview) -> Iterator[memoryview]:
        """Bytes from ``position`` on, which have arrived, as many as the buffer holds at most; in it or elsewhere.

        Raises:
            OSError: the file cannot be read.
            KtmergeError: it is closed.
        """
        if self._blocks is None:
            yield buffer[: os.preadv(self.descriptor, [buffer], position)]
        else:
            with self._blocks.read(position, buffer) as found:
                yield found

    def follow(self, position: int | None) -> None:
        """Say how far someone has come who reads all of it as it arrives, whenever the prefix passes a multiple of
        ``NOTICE``: what they are about to read is held in memory. None: nobody does any more.
        """
        if self._blocks is not None:
            self._blocks.follow(position)

    @property
    def descriptor(self) -> int:
        """For the kernel.

        Raises:
            KtmergeError: the file is closed.
        """
        if self._descriptor is None:
            raise KtmergeError(f"{self._shown}: is closed; nothing more can be written.")
        return self._descriptor

    def count(self, start: int, stop: int) -> int:
        """How many of the bytes ``[start, stop)`` have arrived."""
        with self._arrived:
            return self._spans.count(start, stop)

    def write(self, data: memoryview, position: int) -> None:
        """Write ``data``, bytes, from ``position`` on.

        Raises:
            KtmergeError: the disk is full or fails, or the file is closed.
        """
        with self._use() as descriptor:
            if self._blocks is None:
                write_all(descriptor, data, position)
            else:
                self._blocks.write(data, position)
        self.mark(position, position + len(data))

    def copy(self, source: int, begin: int, end: int, position: int) -> bool:
        """Let the kernel copy the bytes ``[begin, end)`` of the descriptor ``source``; False if it cannot.

        Raises:
            KtmergeError: the disk is full or fails, or the file is closed.
        """
        copy_range = getattr(os, "copy_file_range", None)
        while copy_range is not None and begin < end:
            with self._use() as descriptor:
                try:
                    count = copy_range(source, descriptor, min(end - begin, _KERNEL_COPY), begin, position)
                except OSError as error:
                    if error.errno not in _CANNOT_COPY:
                        raise
                    return False
            if not count:
                return False  # the source is shorter than it was, which whoever reads it can say better
            self.mark(position, position + count)
            begin, position = begin + count, position + count
        return begin == end

    def holds(self, position: int, entry: Entry) -> bool:
        """Whether the pieces of a tensor that begins at ``position`` read back as they were written.

        Raises:
            KtmergeError: the file cannot be read, or is closed.
        """
        buffer = memoryview(bytearray(_READ))
        for piece in entry.pieces:
            checksum = xxhash.xxh3_64()
            start, stop = position + piece.start, position + piece.stop
            while start < stop:
                with self._use() as descriptor:
                    count = os.preadv(descriptor, [buffer[: stop - start]], start)
                if not count:
                    return False
                checksum.update(buffer[:count])
                start += count
            if checksum.intdigest() != piece.checksum:
                return False
        return True

    def mark(self, start: int, stop: int) -> None:
        """Say that the bytes ``[start, stop)`` have arrived."""
        with self._arrived:
            before = self._spans.prefix
            self.is_rewritten |= self._spans.count(start, stop) > 0
            self._spans.add(start, stop)
            after = self._spans.prefix
            if self._blocks is not None:
                self._blocks.prefix = after
            if after // NOTICE > before // NOTICE or before < after == self.size:
                self._arrived.notify_all()

    def flush(self) -> None:
        """Leave nothing to this process: what has arrived is kept should it die.

        Raises:
            KtmergeError: the disk is full or fails, or the file is closed.
        """
        if self._blocks is not None:
            with self._use():
                self._blocks.flush()

    def sync(self) -> None:
        """Force everything to the disk."""
        self.flush()
        with self._use() as descriptor:
            os.fsync(descriptor)

    def close(self) -> None:
        """Close it when nobody writes any more: a closed descriptor's number may soon be another file's."""
        with self._arrived:
            descriptor, self._descriptor = self._descriptor, None
            self._arrived.wait_for(lambda: self._writing == 0)
        if self._blocks is not None:
            self._blocks.close()
        if descriptor is not None:
            os.close(descriptor)

    @contextmanager
    def _use(self) -> Iterator[int]:
        with self._arrived:
            descriptor = self.descriptor
            self._writing += 1
        try:
            with clear_os_errors(self._shown):
                yield descriptor
        finally:
            with self._arrived:
                self._writing -= 1
                if self._descriptor is None:
                    self._arrived.notify_all()
