"""Where the trials of sweeps are kept: a journal file, or a database."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
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
_CHECKSUM, _AFTER = "crc32", "after"
"""Keys of a journal's entry: its checksum, which is over the other one, too: that of the entry before it."""
_COMPACT = (",", ":")
_BLOCK = 1 << 14
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
        return JournalStorage(_Journal(str(path), _lock(str(path))))
    except (OSError, UsageError):
        raise
    except Exception as error:  # whatever Optuna meets in it
        raise _damaged(str(path), f"damaged, or of a later Optuna ({first_line(error)})") from None


class _OutOfOrderError(ValueError):
    """A line of the journal is intact, but not in its place."""


class _Journal(JournalFileBackend):
    """Optuna's journal; every entry has a checksum of itself, and that of the entry before it, so that neither another
    digit in a score nor a line that was lost, doubled or moved goes unnoticed.

    Optuna reads it as its own. Entries without either, of an earlier ktmerge, are taken as they are.
    """

    def __init__(self, path: str, lock: JournalFileOpenLock) -> None:
        super().__init__(path, lock)
        self._names = {0}
        self._links: set[tuple[int, int]] = set()
        self._checked = 0

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        path = Path(self._file_path)
        with _locked(path):
            whole, last = _last_line(path)
            if whole < os.path.getsize(path):  # a worker died, or had no room, while it wrote
                os.truncate(path, whole)
            before, lines = _name(last, path), []
            for one in logs:
                entry = {**one, _AFTER: before}
                before = _checksum(entry)
                lines.append(json.dumps({**entry, _CHECKSUM: before}, separators=_COMPACT) + "\n")
            with path.open("ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        number = min(log_number_from, self._checked)
        try:
            for entry in super().read_logs(number):
                name, after = _require_intact(entry)
                if number == self._checked:
                    self._require_next(name, after)
                number += 1
                if number > log_number_from:
                    yield entry
        except ValueError as error:
            how = str(error) if isinstance(error, _OutOfOrderError) else "damaged"
            raise _damaged(f"{self._file_path}, line {number + 1}", how) from None

    def _require_next(self, name: int, after: int | None) -> None:
        """Hold an entry to those before it.

        It follows any of them, not only the last: of two workers, one that was held up for longer than its lock is
        respected writes after the same entry as the other.

        Raises:
            _OutOfOrderError: it stands there a second time, or what it follows is missing.
        """
        if after is not None:
            if after not in self._names:
                raise _OutOfOrderError("damaged: a line before this one was lost or moved")
            if (name, after) in self._links:
                raise _OutOfOrderError("damaged: this line stands there twice")
            self._links.add((name, after))
        self._names.add(name)
        self._checked += 1


def _require_intact(entry: Any) -> tuple[int, int | None]:
    """Take the checksums out of an entry, and hold it to them: its own, and that of the one before, if it tells.

    Raises:
        ValueError: it is another, or the entry is none.
    """
    if not isinstance(entry, dict):
        raise ValueError("damaged")
    told, found = entry.pop(_CHECKSUM, None), _checksum(entry)
    if told not in (None, found):
        raise ValueError("damaged")
    return found, entry.pop(_AFTER, None)


def _name(line: bytes, path: Path) -> int:
    """The checksum of an entry as it is written; 0 where there is none."""
    try:
        return _require_intact(json.loads(line))[0] if line else 0
    except ValueError:
        raise _damaged(f"{path}, its last line", "damaged") from None


def _checksum(entry: Mapping[str, Any]) -> int:
    """CRC-32 of an entry as JSON, which is the same once it was written and read."""
    return zlib.crc32(json.dumps(entry, separators=_COMPACT).encode())


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
    if not _is_unfinished(path):
        return
    time.sleep(1.0)  # somebody may be writing it just now
    with _locked(path):
        if _is_unfinished(path):
            os.truncate(path, _last_line(path)[0])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _lock(str(path))
    lock.acquire()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # others took it away, since this took so long
            lock.release()


def _lock(where: str) -> JournalFileOpenLock:
    """A lock that a killed worker may leave: others wait half a minute for it, then take it away.

    Not Optuna's other one, a link to the journal: where that leads nowhere, as a relative path may, they wait for ever.
    """
    return JournalFileOpenLock(where, grace_period=_LOCKED_SECONDS)


def _is_unfinished(path: Path) -> bool:
    return path.exists() and _last_line(path)[0] < path.stat().st_size


def _last_line(path: Path) -> tuple[int, bytes]:
    """Where the last whole line of a journal ends, in bytes, and that line."""
    tail = b""
    with path.open("rb") as file:
        start = size = file.seek(0, os.SEEK_END)
        while start and tail.count(b"\n") < 2:
            start = max(0, size - max(_BLOCK, 4 * len(tail)))
            file.seek(start)
            tail = file.read(size - start)
    end = tail.rfind(b"\n") + 1
    return start + end, tail[tail.rfind(b"\n", 0, max(0, end - 1)) + 1 : end]


def study_names(storage: BaseStorage) -> list[str]:
    """Names of all studies in a storage."""
    return [one.study_name for one in storage.get_all_studies()]


def trials_of(storage: BaseStorage, study: str) -> list[FrozenTrial]:
    """All trials of a study, by number; none if there is no such study."""
    if study not in study_names(storage):
        return []
    return optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)


def trial_numbered(storage: BaseStorage, study: str, number: int) -> FrozenTrial:
    """A trial of a study.

    Raises:
        UsageError: there is none.
    """
    if study not in study_names(storage):
        raise UsageError(f"there is no study '{study}' in that storage.")
    trials = trials_of(storage, study)
    if not 0 <= number < len(trials):
        known = f"0 to {len(trials) - 1}" if trials else "none yet"
        raise UsageError(f"--trial {number}: the sweep has no such trial; its trials: {known}.")
    return trials[number]
