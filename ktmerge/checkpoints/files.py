"""Carrying the files that travel with the weights, and keeping outputs away from inputs."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.errors import KtmergeError, UsageError, did_you_mean

if TYPE_CHECKING:
    from ktmerge.checkpoints.checkpoint import Checkpoint

_Place = tuple[int, int] | Path
"""Device and number of a folder; its path where it is not there yet."""
_BLOCK = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})

UNFINISHED = r"\.\d+\.\d+\.tmp"
"""How a file is called that `write_whole` was killed at, after a dot and its name."""


def copy_files(checkpoint: Checkpoint, folder: Path, skip: Collection[str] = ()) -> list[str]:
    """Copy everything but the weights (tokenizer, processor, chat template, remote code) into ``folder``.

    Subfolders are kept; files that ``folder`` already has, and those in ``skip``, are left alone. The copies get the
    usual permissions of new files.

    Returns:
        the copied files, relative to the checkpoint.

    Raises:
        KtmergeError: a file cannot be read or written.
    """
    copied: list[str] = []
    for file in checkpoint.other_files:
        target = folder / file
        if file in skip or target.exists():
            continue
        with clear_os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.root / file, target)
        copied.append(file)
    return copied


def refuse_overlap(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, lies inside one, or contains one, be it under another name.

    Raises:
        UsageError: writing ``out`` would change or replace an input.
    """
    target = _way_up(out)
    for given in inputs:
        source = _way_up(given)
        if target[0] == source[0]:
            raise UsageError(f"{out}: is one of the inputs; choose another output folder.")
        if source[0] in target:
            raise UsageError(f"{out}: lies inside the input {given}; choose an output folder elsewhere.")
        _refuse_holding(out, target, given, source)


def refuse_holding(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that contains an input, be it under another name.

    Raises:
        UsageError: replacing ``out`` would remove one.
    """
    target = _way_up(out)
    for given in inputs:
        _refuse_holding(out, target, given, _way_up(given))


def _refuse_holding(out: Path, target: list[_Place], given: Path, source: list[_Place]) -> None:
    if target[0] in source[1:]:
        raise UsageError(f"{out}: contains the input {given}; choose an output folder elsewhere.")


def _way_up(path: Path) -> list[_Place]:
    """A folder and those it lies in, each by its place on the disk, which other mounts and spellings share."""
    real = Path(os.path.realpath(path))
    found: list[_Place] = []
    for folder in (real, *real.parents):
        try:
            status = folder.stat()
            found.append((status.st_dev, status.st_ino))
        except OSError:  # not there yet
            found.append(folder)
    return found


def write_all(descriptor: int, data: memoryview | bytes, position: int) -> None:
    """Write all of ``data`` from ``position`` on.

    Raises:
        OSError: it cannot be written.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


def file_digest(path: Path, look: Callable[[], None] = lambda: None) -> str:
    """sha256 of a file, as hexadecimal.

    Args:
        path: of the file.
        look: called now and then; what it raises ends the reading.

    Raises:
        KtmergeError: it cannot be read.
    """
    digest = hashlib.sha256()
    with clear_os_errors(path), path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            look()
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, content: str | bytes, *, sync: bool = True, replace: bool = True) -> None:
    """Write a file by one rename, so that it is there whole or not at all; text as UTF-8.

    Args:
        path: of the file.
        content: all of it.
        sync: force it to the disk first, so that this holds even if the machine stops.
        replace: what is there already, if anything is.

    Raises:
        UsageError: it is there, and is not to be replaced.
        KtmergeError: the disk is full, the folder is missing or may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with clear_os_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            if replace or not _linked(temporary, path):
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file its name unless another has it; False where the file system knows no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise UsageError(
            f"{path} was written by another run meanwhile; choose another name, or add --overwrite."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def refuse_unwritable(path: Path, shown: Path | None = None) -> None:
    """Refuse a place where nothing may be made, before the work for it is done; ``shown`` names it in the message.

    Raises:
        UsageError: the folder that ``path`` is to be made in, or the nearest above it that is there, takes no files.
    """
    folder = next(one for one in Path(os.path.abspath(path)).parents if os.path.exists(one))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{shown or path}: nothing may be written into the folder {folder}; choose another.")


def near_file(path: Path) -> str:
    """`` Did you mean 'x'?``, of what lies beside a file that is not there; empty if nothing is called alike."""
    try:
        return did_you_mean(path.name, os.listdir(path.parent), list_all=False)
    except OSError:
        return ""


@contextmanager
def clear_os_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses about ``path`` into one clear sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise KtmergeError(f"{path}: the disk is full; free some space and start again.") from error
        if error.errno == errno.EFBIG:
            raise KtmergeError(
                f"{path}: is larger than files may be here; raise the limit (ulimit -f), or choose another disk."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise KtmergeError(f"{error.filename or path}: no permission to read or write here.") from error
        raise KtmergeError(f"{error.filename or path}: {error.strerror or error}.") from error
