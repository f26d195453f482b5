"""What follows behind a file that is being written: its digest, and the disk."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import threading
from collections.abc import Mapping

from ktmerge.checkpoints.blocks import NOTICE
from ktmerge.checkpoints.output import OutputFile
from ktmerge.errors import KtmergeError

_BLOCK = 1 << 20
"""Bytes hashed at a time: they lie in the page cache, and should lie in the processor's."""
_PUSHED = 32 << 20
"""Bytes after which the kernel is asked to begin writing them to the disk; a multiple of NOTICE."""
_SYNC_FILE_RANGE_WRITE = 2


class Follower:
    """Two threads: one hashes each file as far as it has arrived without a gap, the other has the kernel write it.

    So that when the last byte is there, little is left to hash and little left to wait for.

    Args:
        files: by name; all of them, before anything is written.
        arrived: the condition of those files.
    """

    def __init__(self, files: Mapping[str, OutputFile], arrived: threading.Condition) -> None:
        self._files = files
        self._arrived = arrived
        self._digests = {file: hashlib.sha256() for file in files}
        self._hashed = dict.fromkeys(files, 0)
        self._pushed = dict.fromkeys(files, 0)
        self._stopped = False
        self._failure: OSError | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._hash, self._push)]
        for thread in self._threads:
            thread.start()

    def digests(self) -> dict[str, str]:
        """sha256 of each file as hexadecimal, once all of it has arrived.

        Raises:
            KtmergeError: a file cannot be read back.
        """
        self._threads[0].join()
        for file in [name for name, file in self._files.items() if file.is_rewritten]:
            self._digests[file] = hashlib.sha256()  # what was hashed may be what was written first
            self._follow(file, 0, self._files[file].size)
        if self._failure is not None:
            raise KtmergeError(f"what was written cannot be read back: {self._failure.strerror}.")
        if self._stopped:
            raise KtmergeError("the output was closed before it was complete.")
        return {file: digest.hexdigest() for file, digest in self._digests.items()}

    def stop(self) -> None:
        """End both threads; returns when they use no file any more."""
        with self._arrived:
            self._stopped = True
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join()

    def _hash(self) -> None:
        try:
            for file in self._files.values():
                file.follow(0)
            while (span := self._next(self._hashed, NOTICE)) is not None and self._follow(*span):
                self._hashed[span[0]] = span[2]
        finally:
            for file in self._files.values():
                file.follow(None)

    def _follow(self, file: str, position: int, stop: int) -> bool:
        """Hash the bytes ``[position, stop)`` of a file; whether they could all be read."""
        buffer = memoryview(bytearray(_BLOCK))
        while position < stop and not self._stopped:
            try:
                with self._files[file].read(position, buffer[: stop - position]) as found:
                    self._digests[file].update(found)
                    count = len(found)
            except OSError as error:
                self._failure = error
                return False
            if not count:
                self._failure = OSError(errno.EIO, "the file is shorter than what was written")
                return False
            position += count
            self._files[file].follow(position)
        return position == stop

    def _push(self) -> None:
        sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
        if sync_file_range is None:
            return
        sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        while (span := self._next(self._pushed, _PUSHED)) is not None:
            file, start, stop = span
            sync_file_range(self._files[file].descriptor, start, stop - start, _SYNC_FILE_RANGE_WRITE)
            self._pushed[file] = stop

    def _next(self, done: Mapping[str, int], enough: int) -> tuple[str, int, int] | None:
        """The next file, first and last byte (exclusive) to work on; waits for it. None: everything is done."""

        with self._arrived:
            while not self._stopped:
                unfinished = [(name, file) for name, file in self._files.items() if done[name] < file.size]
                for name, file in unfinished:
                    if file.prefix // enough > done[name] // enough or file.prefix == file.size:
                        return name, done[name], file.prefix
                if not unfinished:
                    break
                self._arrived.wait()
        return None
