"""A temporary folder beside an output, and the one rename that turns it into the output."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ktmerge.checkpoints.files import clear_os_errors, refuse_unwritable
from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.errors import KtmergeError, UsageError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_LONGEST_NAME = 255 - len("..ktmerge-4194304-old")
"""Bytes of an output's name: file systems take 255, and the temporary folder's adds to it."""
_OURS = frozenset({"config.json", "delta.json", "ktmerge-bundle.json"})
"""What a folder holds that may be replaced if asked: a checkpoint, a delta, or a bundle."""
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class Staging:
    """The life of one temporary folder: opened, filled by others, then published or discarded.

    A lock on the folder is held while it is in use, so that another run can tell what a dead one left behind, whatever
    has become of its process number.

    Raises:
        UsageError: the output exists and may not be replaced.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self._given = out
        self._out = Path(os.path.realpath(out))
        self._overwrite = overwrite
        self._made: list[Path] = []
        self._lock: int | None = None
        refuse_output(out, overwrite)

    @property
    def folder(self) -> Path:
        """The temporary folder."""
        return self._out.parent / f".{self._out.name}.ktmerge-{os.getpid()}"

    def open(self, wanted: Callable[[Path], bool] = lambda folder: False) -> list[Path]:
        """Make the folder, or take over one that a dead run left beside it and that is ``wanted``.

        Returns:
            what else dead runs had left, which is removed.

        Raises:
            KtmergeError: another run is writing the same output from this process, or the place cannot be written.
        """
        is_new = False
        try:
            # Cut off inside a call that makes a folder, nobody would know that it is there.
            with uninterrupted(), clear_os_errors(self._out.parent):
                self._made = _make_parents(self._out.parent)
                removed = self._take_over(wanted)
                refuse_output(self._given, self._overwrite)  # the line above may have put an old output back
                if self._lock is None:
                    self._lock = make_locked(self.folder)
                    is_new = True
        except BaseException:
            if is_new:
                self.discard()
            else:
                self.leave()
            raise
        return removed

    def require_space(self, needed: int) -> None:
        """Refuse to start what the disk cannot hold.

        Raises:
            KtmergeError: fewer than ``needed`` bytes are free.
        """
        try:
            free = shutil.disk_usage(self._out.parent).free
        except OSError:  # some file systems do not say
            return
        if free < needed:
            raise KtmergeError(
                f"{self._given}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on that disk."
            )

    def publish(self, without: str | None = None) -> None:
        """Make the folder the output in one step; what it replaces is removed afterwards.

        Args:
            without: a file in the folder that is no part of the output: it goes last of all, and is there again if
                nothing was published.

        Raises:
            UsageError: something else appeared at the output meanwhile.
            KtmergeError: the rename failed.
        """
        refuse_output(self._given, self._overwrite)
        with clear_os_errors(self._out), self._taken_out(without):
            if self._out.exists() and any(self._out.iterdir()):
                _exchange(self.folder, self._out)
            else:
                os.rename(self.folder, self._out)
        self._made = []
        _sync_folder(self._out.parent)

    @contextlib.contextmanager
    def _taken_out(self, name: str | None) -> Iterator[None]:
        path = None if name is None else self.folder / name
        if path is None or not path.exists():
            yield
            return
        content = path.read_bytes()
        try:
            path.unlink()
            _sync_folder(self.folder)
            yield
        except BaseException:
            # Once the folder is the output, another may have its name: the one it replaced.
            with contextlib.suppress(OSError):
                if self._lock is not None and os.path.samestat(os.fstat(self._lock), os.stat(self.folder)):
                    path.write_bytes(content)
            raise

    def discard(self) -> None:
        """Remove whatever stands under the temporary name: the unfinished output, or the replaced one."""
        with uninterrupted():
            if self._lock is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.leave()

    def leave(self) -> None:
        """Go as a killed run does, the unfinished output staying; empty parents made for it don't."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        with contextlib.suppress(OSError):
            while self._made:
                self._made.pop().rmdir()

    def _take_over(self, wanted: Callable[[Path], bool]) -> list[Path]:
        """Go through the temporary folders of this output that no living run holds; return the removed ones."""
        removed: list[Path] = []
        for path, descriptor in dead_runs(self._out):
            free = self._lock is None and (path == self.folder or not self.folder.exists())
            if free and wanted(path):
                self._lock = descriptor
                os.rename(path, self.folder)
            else:
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)
                removed.append(path)
        return removed


def refuse_output(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that is in use, may not be replaced, or cannot be.

    Raises:
        UsageError: ``out`` is a file, a mount point, or holds something and ``overwrite`` is not set; or it holds
            something that is no checkpoint; or its name leaves no room for what the temporary folder's adds; or nothing
            may be written beside it.
    """
    target = Path(os.path.realpath(out))
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise UsageError(f"{out}: its name is too long; choose one of at most {_LONGEST_NAME} bytes.")
    try:
        names = os.listdir(target)
    except FileNotFoundError:
        names = []
    except NotADirectoryError:
        raise UsageError(f"{out}: is a file, or lies below one; choose another output folder.") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot be used as output: {error.strerror}.") from None
    if os.path.ismount(target):
        raise UsageError(f"{out}: is a mount point, which cannot be replaced in one step; give a folder inside it.")
    refuse_unwritable(target, out)
    if not names:
        return
    if not overwrite:
        raise UsageError(f"{out}: exists and is not empty; choose another folder, or add --overwrite.")
    if not any(name in _OURS or name.endswith(".safetensors") for name in names):
        raise UsageError(f"{out}: holds files but no checkpoint, so --overwrite will not replace it.")


def preallocate(descriptor: int, size: int) -> None:
    """Give a file its full size, and the room for it where the file system can promise that."""
    # libc directly: posix_fallocate falls back to writing every block where the file system can't.
    fallocate = getattr(_libc(), "fallocate", None)
    if fallocate is not None and size:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(descriptor, 0, 0, size) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


def sync_tree(root: Path, skip: Collection[str] = ()) -> None:
    """Force all files and folders below ``root`` to the disk, except the files (relative) in ``skip``."""
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder) / name
            if path.relative_to(root).as_posix() not in skip:
                _sync_folder(path)
        _sync_folder(Path(folder))


def _sync_folder(path: Path) -> None:
    with clear_os_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders so that at no moment either name is missing; where that can't be, with the shortest gap."""
    renameat2 = getattr(_libc(), "renameat2", None)
    if renameat2 is not None:
        code = renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
        if code == 0:
            return
        if ctypes.get_errno() not in _UNSUPPORTED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = new.with_name(new.name + "-old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that were made, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def make_locked(folder: Path) -> int:
    """Make a folder and lock it; the lock goes with the returned descriptor, or with the process."""
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            raise KtmergeError(
                f"{folder}: another run is writing this output; if none is, remove that folder."
            ) from None
        try:
            descriptor = _locked(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if descriptor is not None:
            return descriptor


def _locked(folder: Path) -> int | None:
    """Lock a folder just made; None if it is gone, as a run that cleans up took it for a dead one's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _try_lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.ENOLCK):
            raise


def remove_dead_runs(out: Path) -> None:
    """Remove the temporary folders of the same output that no living run holds."""
    for path, descriptor in dead_runs(out):
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def dead_runs(out: Path) -> Iterator[tuple[Path, int]]:
    """The temporary folders of the same output that no living run holds, each with a descriptor that locks it now."""
    pattern = re.compile(re.escape(f".{out.name}.ktmerge-") + r"\d+(-old)?$")
    for name in sorted(os.listdir(out.parent)):
        if not pattern.match(name):
            continue
        path = out.parent / name
        if name.endswith("-old") and not out.exists():
            os.rename(path, out)  # a run died in the gap of the exchange; the old output is whole
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except OSError:
            held = False  # in use, or a file system without locks, where nobody can tell
        if held:
            yield path, descriptor
        else:
            os.close(descriptor)
