"""What is read with distrust: files and nothing but files, as a pipe may never begin; JSON that says things once."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ktmerge.errors import UsageError


def is_file(path: Path, reference: str | Path) -> bool:
    """Whether there is a file at a path that somebody has called ``reference``.

    Raises:
        UsageError: nobody can tell, as of a name too long or in a folder not to be entered.
    """
    try:
        return path.is_file()
    except OSError as error:
        raise UsageError(f"{reference}: cannot be looked up: {error.strerror}.") from None


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, for reading.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield stream


def read_regular(path: Path) -> bytes:
    """All bytes of a regular file. Raises as `open_regular` does."""
    with open_regular(path) as stream:
        return stream.read()


def is_below(name: str) -> bool:
    """Whether a name that somebody wrote down means a file below the folder it is given for, and nothing elsewhere."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice, as its ``object_pairs_hook``.

    Raises:
        ValueError: one does.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key in found if counts[key] > 1)!r} stands twice")
    return found
