"""Where the trials of sweeps are kept: a journal file, or a database."""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_CHECKSUM = "crc32"
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
        return JournalStorage(_Journal(str(path), lock_obj=_lock(str(path))))
    except (OSError, UsageError):
        raise
    except Exception as error:  # whatever Optuna meets in it
        raise _damaged(str(path), f"damaged, or of a later Optuna ({first_line(error)})") from None


class _Journal(JournalFileBackend):
    """Optuna's journal; every entry has a checksum of itself, so that another digit in a score does not go unnoticed.

    Optuna reads it as its own. Entries without checksum, of an earlier ktmerge, are taken as they are.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        super().append_logs([{**one, _CHECKSUM: _checksum(one)} for one in logs])

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        line = log_number_from + 1
        try:
            for entry in super().read_logs(log_number_from):
                _require_intact(entry)
                yield entry
                line += 1
        except ValueError:
            raise _damaged(f"{self._file_path}, line {line}", "damaged") from None


def _require_intact(entry: Any) -> None:
    """Take the checksum out of an entry, and hold it to that.

    Raises:
        ValueError: it is another, or the entry is none.
    """
    if not isinstance(entry, dict):
        raise ValueError("no entry")
    told = entry.pop(_CHECKSUM, None)
    if told not in (None, _checksum(entry)):
        raise ValueError("another checksum")


def _checksum(entry: Mapping[str, Any]) -> int:
    """CRC-32 of an entry as JSON, which is the same once it was written and read."""
    return zlib.crc32(json.dumps(entry, separators=(",", ":")).encode())


def _damaged(where: str, how: str) -> UsageError:
    return UsageError(
        f"{where}: the sweep's journal is {how}; put an earlier copy in its place, or begin the sweep anew with "
        "--overwrite."
    )


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
