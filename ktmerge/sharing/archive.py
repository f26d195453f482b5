"""A bundle in one file, a zip of the plainest kind: how it is written, and how a stranger's is read.

What is refused before anything is unpacked: more than a bundle's files, sizes that no file has, entries that share
bytes, encryption, links, anything before the first entry or after the last. What is unpacked is counted as it streams.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.errors import UsageError
from ktmerge.sharing import contents

_BLOCK = 1 << 20
_DIRECTORY = 1 << 17
"""Bytes of a zip's table of contents that are read; that of a full bundle is smaller."""
_END, _END_SIZE = b"PK\x05\x06", 22
_LOCATOR, _LOCATOR_SIZE = b"PK\x06\x07", 20
_WIDE_END = b"PK\x06\x06"
_RATIO = 250
_SMALL = 1 << 20
_HEADER = 30
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_DESCRIBED, _BEHIND = 0x8, (12, 16, 20, 24)
"""In a header: checksum and sizes follow the bytes, in one of so many."""
_SHORT, _WIDE = 0xFFFF, 0xFFFFFFFF
"""A number that stands in a wider field elsewhere."""
_TIME = (1980, 1, 1, 0, 0, 0)
_OTHERS = {
    b"<": ", but a web page: the server may want you to log in, or the address be of a page that leads to the file",
    b"version https://git-lfs": ", but a pointer to one, as git has it without LFS: 'git lfs pull' fetches the file",
    b"\x1f\x8b": ", but something that gzip made",
}
"""What is taken for a bundle, by how it begins."""
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    ValueError,
    RuntimeError,
    OverflowError,
    struct.error,
)


def write_archive(target: Path, files: Mapping[str, Path]) -> None:
    """Write a bundle; the same files give the same bytes.

    Args:
        target: of the archive; the caller makes it appear whole.
        files: by name in the bundle.

    Raises:
        KtmergeError: a file cannot be read, or the archive not written.
    """
    order = sorted(files, key=lambda name: (name != contents.MANIFEST, name))
    with clear_os_errors(target), zipfile.ZipFile(target, "w") as archive:
        for name in order:
            info = zipfile.ZipInfo(name, _TIME)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.create_system = 3
            # A delta is compressed as it is; stored, its real size cannot differ from the archive's.
            packed = name not in contents.DELTA_FILES[1:]
            info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            info.file_size = files[name].stat().st_size
            with files[name].open("rb") as source, archive.open(info, "w") as entry:
                while block := source.read(_BLOCK):
                    entry.write(block)


class Archive:
    """A bundle's file, opened for reading.

    Args:
        stream: seekable; of a file, or of something that is read over the net.
        size: of it.
        where: it is called in messages.

    Raises:
        UsageError: it is no bundle, or one that nobody should unpack.
    """

    def __init__(self, stream: IO[bytes], size: int, where: str) -> None:
        self._where = where
        self._stream = stream
        with self._clear():
            begin, count = self._require_plain_end(stream, size)
            self._zip = zipfile.ZipFile(stream)
        self._ends: dict[str, int] = {}
        self._entries = self._checked(self._zip.infolist(), begin, count)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, as the archive tells them."""
        return {name: info.file_size for name, info in self._entries.items()}

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            UsageError: it is not as the archive tells.
        """
        return b"".join(self.blocks(name))

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file piece by piece, never more than the archive told.

        Raises:
            UsageError: it is not as the archive tells.
        """
        info, count = self._entries[name], 0
        with self._clear():
            self._require_told_alike(info)
        with self._clear(), self._zip.open(info) as entry:
            while block := entry.read(_BLOCK):
                count += len(block)
                if count > info.file_size:
                    raise UsageError(f"{self._where}: '{name}' is larger than the archive tells; it is not unpacked.")
                yield block
        if count != info.file_size:
            raise UsageError(f"{self._where}: '{name}' is shorter than the archive tells; it is broken.")

    def _require_plain_end(self, stream: IO[bytes], size: int) -> tuple[int, int]:
        """Where the table of contents begins, and its few entries, told before it is read by an end of one meaning."""
        stream.seek(max(0, size - _END_SIZE - _LOCATOR_SIZE))
        tail = stream.read(_END_SIZE + _LOCATOR_SIZE)
        end, locator = tail[-_END_SIZE:], tail[:-_END_SIZE]
        if len(end) < _END_SIZE or not end.startswith(_END) or end[-2:] != b"\0\0":
            stream.seek(0)
            head = stream.read(_HEADER).lstrip()
            other = next((what for first, what in _OTHERS.items() if head.startswith(first)), "")
            raise UsageError(f"{self._where}: is no bundle{other or ': it does not end as a zip does'}.")
        disk, start, *told = struct.unpack("<4H2L", end[4:20])
        after = size - _END_SIZE
        if locator.startswith(_LOCATOR):
            place = struct.unpack("<Q", locator[8:16])[0]
            after = size - _END_SIZE - _LOCATOR_SIZE - 56
            stream.seek(max(0, after))
            wide = stream.read(56)
            narrow, told = told, list(struct.unpack("<24x4Q", wide))
            alike = all(one in (wanted, _SHORT, _WIDE) for one, wanted in zip(narrow, told, strict=True))
            if place != after or not wide.startswith(_WIDE_END) or not alike:
                raise UsageError(f"{self._where}: is no bundle: its ends contradict each other.")
        here, count, length, begin = told
        if disk or start or here != count or begin + length != after:
            raise UsageError(f"{self._where}: is no bundle: its table of contents is not where it says.")
        if count > contents.MAX_FILES + len(contents.FOLDERS) or length > _DIRECTORY:
            raise UsageError(f"{self._where}: holds more than {contents.MAX_FILES} files; nothing was unpacked.")
        return begin, count

    def _checked(self, infos: list[zipfile.ZipInfo], directory: int, count: int) -> dict[str, zipfile.ZipInfo]:
        if len(infos) != count:
            raise UsageError(f"{self._where}: is no bundle: its table of contents has other entries than it says.")
        files = [info for info in infos if not self._is_folder(info)]
        contents.require_names([info.orig_filename for info in files], self._where)
        ordered = sorted(infos, key=lambda one: one.header_offset)
        starts = [*(info.header_offset for info in ordered), directory]
        for info, end in zip(ordered, starts[1:], strict=True):
            self._require_plain(info)
            self._ends[info.orig_filename] = end
            if starts[0] or info.header_offset + _HEADER + len(info.orig_filename) + info.compress_size > end:
                raise UsageError(f"{self._where}: entries share bytes, or there is something before them.")
        entries = {info.filename: info for info in files}
        contents.require_sizes({name: info.file_size for name, info in entries.items()}, self._where)
        return entries

    def _require_told_alike(self, info: zipfile.ZipInfo) -> None:
        """Hold what stands before an entry's bytes to the table of contents: other programs believe the former."""
        self._stream.seek(info.header_offset)
        flags, method, *numbers, name, extra = struct.unpack("<6x2H4x3L2H", self._stream.read(_HEADER))
        later = (0, 0, 0) if flags & _DESCRIBED else ()
        told = (info.CRC, info.compress_size, info.file_size)
        if (flags, method) != (info.flag_bits, info.compress_type) or not all(
            number in (wanted, _WIDE, *later) for number, wanted in zip(numbers, told, strict=True)
        ):
            raise UsageError(f"{self._where}: '{info.filename}' has two headers that contradict each other.")
        behind = self._ends[info.filename] - (info.header_offset + _HEADER + name + extra + info.compress_size)
        if behind not in (_BEHIND if later else (0,)):
            raise UsageError(
                f"{self._where}: '{info.filename}' shares bytes with what follows it, or hides some behind it."
            )

    def _is_folder(self, info: zipfile.ZipInfo) -> bool:
        """A folder's own entry, as some programs write it: only of those that a bundle has, and empty."""
        plain = info.orig_filename.removesuffix("/")
        empty = not info.file_size and info.compress_size <= 2  # nothing, compressed
        return plain != info.orig_filename and plain in contents.FOLDERS and empty

    def _require_plain(self, info: zipfile.ZipInfo) -> None:
        kind = stat.S_IFMT(info.external_attr >> 16)
        name = info.orig_filename
        if kind and not (stat.S_ISREG(kind) or (stat.S_ISDIR(kind) and self._is_folder(info))):
            raise UsageError(f"{self._where}: '{name}' is a link or a device; nothing was unpacked.")
        if info.filename != name:  # an entry may bring a second name along, which newer zip libraries prefer
            raise UsageError(f"{self._where}: '{name}' has two names; nothing was unpacked.")
        if info.flag_bits & _ENCRYPTED:
            raise UsageError(f"{self._where}: '{name}' is encrypted; nothing was unpacked.")
        stored = info.compress_type == zipfile.ZIP_STORED
        if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
            raise UsageError(f"{self._where}: '{name}' is compressed in a way that bundles are not.")
        if stored and info.file_size != info.compress_size:
            raise UsageError(f"{self._where}: '{name}' is stored, but has two sizes; nothing was unpacked.")
        if name == contents.DELTA_FILES[1] and not stored:
            raise UsageError(f"{self._where}: '{name}' is compressed twice; nothing was unpacked.")
        if info.file_size > max(_SMALL, _RATIO * info.compress_size):
            raise UsageError(
                f"{self._where}: '{name}' grows from {info.compress_size} to {info.file_size} bytes; no file of a "
                "bundle does, and nothing was unpacked."
            )

    @contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            reason = str(error) or type(error).__name__
            raise UsageError(f"{self._where}: is no bundle, or a broken one: {reason}.") from None


@contextmanager
def opened_archive(path: Path) -> Iterator[Archive]:
    """The bundle in a file on this machine.

    Raises:
        UsageError: it is none.
        KtmergeError: it cannot be read.
    """
    with clear_os_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to would never open
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path}: is no file.")
            yield Archive(stream, status.st_size, str(path))
