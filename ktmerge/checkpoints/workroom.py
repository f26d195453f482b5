"""Temporary folders that nothing outlives for long: what a killed run left is removed by the next."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.checkpoints.staging import make_locked, remove_dead_runs


@contextmanager
def workroom(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, on the same disk, so that what is made there can be renamed.

    Nobody else may read it, and it is locked while it is in use. Folders for the same target that no living run
    holds are removed first.

    Raises:
        KtmergeError: the place cannot be written.
    """
    place = Path(os.path.realpath(target.absolute().parent)) / target.name
    with clear_os_errors(place.parent):
        remove_dead_runs(place)
        folder = place.with_name(f".{place.name}.ktmerge-{os.getpid()}{time.time_ns()}")
    lock: int | None = None
    try:
        with uninterrupted(), clear_os_errors(place.parent):  # cut off in it, nobody would know what was made
            lock = make_locked(folder)
            folder.chmod(0o700)
        yield folder
    finally:
        if lock is not None:
            with uninterrupted():
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def passing_room(purpose: str) -> Path:
    """A target for a `workroom` among the temporary files of this user."""
    return Path(tempfile.gettempdir()) / f"ktmerge-{purpose}-{os.getuid()}"
