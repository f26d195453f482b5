"""Where the trials of sweeps are kept: a journal file, or a database."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from ktmerge.errors import UsageError, first_line

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_PAUSE, _ATTEMPTS = 0.5, 5
"""Seconds between attempts to open a database, and how many there are, not counting those of tables being made."""
_BUSY_SECONDS = 600
"""How long a worker waits for others that write to an SQLite file; on slow disks that takes long."""
_LOCKED_SECONDS = 30
"""How long a lock on a journal nobody writes to is respected."""
_MAKING = re.compile(
    r"table .* already exists|no such table|database is locked|relation .* (already exists|does not exist)|"
    r"duplicate key|UNIQUE constraint",
    re.IGNORECASE,
)
"""What databases say to a worker while another makes the tables."""


def open_storage(where: str) -> BaseStorage:
    """A database by URL, or a journal file.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        if "://" in where:
            return _database(where)
        return _journal(Path(where))
    except ImportError:
        raise UsageError(
            "the storage of the sweep cannot be opened: the driver of its database is not installed"
            + ("; pip install 'ktmerge[postgresql]'." if where.startswith("postgresql:") else ".")
        ) from None
    except UsageError:
        raise
    except Exception as error:  # SQLAlchemy and database drivers raise what they like
        raise UsageError(f"the storage of the sweep cannot be opened: {first_line(error)}") from None


def _journal(path: Path) -> BaseStorage:
    _mend(path)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_lock(str(path))))
    except OSError:
        raise
    except Exception as error:  # whatever Optuna meets in it
        at = f", line {line}" if (line := _damaged(path)) else ""
        raise UsageError(
            f"{path}{at}: the sweep's journal is damaged, or of a later Optuna ({first_line(error)}); put an earlier "
            "copy in its place, or begin the sweep anew with --overwrite."
        ) from None


def _damaged(path: Path) -> int | None:
    """The first line of a journal that is none of its entries, if one shows it."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            if not isinstance(json.loads(line).get("op_code"), int):
                return number
        except (ValueError, AttributeError):
            return number
    return None


def _database(url: str) -> BaseStorage:
    """Several workers may make the tables at once: those that come second fail, and find them made."""
    settings = {"connect_args": {"timeout": _BUSY_SECONDS}} if url.startswith("sqlite") else None
    left = _ATTEMPTS
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return RDBStorage(url, settings)
        except Exception as error:
            left -= not (_MAKING.search(str(error)) and time.monotonic() < until)
            if left <= 0:
                raise
        time.sleep(_PAUSE)


def _mend(path: Path) -> None:
    """Cut off a line that a full disk or a power cut left unfinished: it would keep the journal from being read."""
    size = _unfinished(path)
    if size is None:
        return
    time.sleep(1.0)  # somebody may be writing it just now
    lock = _lock(str(path))
    lock.acquire()
    try:
        if (now := _unfinished(path)) is not None:
            with path.open("r+b") as file:
                file.truncate(now)
    finally:
        lock.release()


def _lock(where: str) -> JournalFileOpenLock:
    """A lock that a killed worker may leave: others wait half a minute for it, then take it away.

    Not Optuna's other one, a link to the journal: where that leads nowhere, as a relative path may, they wait for ever.
    """
    return JournalFileOpenLock(where, grace_period=_LOCKED_SECONDS)


def _unfinished(path: Path) -> int | None:
    """How much of the journal is whole, if not all."""
    content = path.read_bytes() if path.exists() else b""
    return None if not content or content.endswith(b"\n") else content.rfind(b"\n") + 1


def study_names(storage: BaseStorage) -> list[str]:
    """Names of all studies in a storage."""
    return [one.study_name for one in storage.get_all_studies()]


def trial_numbered(storage: BaseStorage, study: str, number: int) -> FrozenTrial:
    """A trial of a study.

    Raises:
        UsageError: there is none.
    """
    if study not in study_names(storage):
        raise UsageError(f"there is no study '{study}' in that storage.")
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        known = f"0 to {len(trials) - 1}" if trials else "none yet"
        raise UsageError(f"--trial {number}: the sweep has no such trial; its trials: {known}.")
    return trials[number]
