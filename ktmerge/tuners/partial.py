"""The working folder of a fine-tune, ``<out>.partial``: what it was started with, its checkpoints, its log.

A checkpoint counts only with a list of its files and their sha256 beside them, written last; one that a kill cut short
has none, and is passed over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.files import clear_os_errors, file_digest, write_whole
from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.checkpoints.staging import remove_dead_runs, sync_tree
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.tuners.processes import ALONE, Processes

LOG = "log.jsonl"
FINAL = "final"
_STARTED = "started.json"
_SEAL = "complete.json"
_LOCK = "lock"
READING = "reading"
"""Among the inputs: digests of what tokenizer, chat template and configuration make of model and data."""


@dataclass(frozen=True)
class Saved:
    """One complete state: after ``step`` steps and ``seconds`` of work."""

    path: Path
    step: int
    seconds: float


class Partial:
    """Holds the folder, locked, for the length of a run; removes it if the run leaves nothing in it to go on from.

    Of several processes the first does all of it, for all.

    Args:
        out: where the result will be.
        inputs: everything that decides the result; a later run may go on only with the same.
        processes: of the run.

    Raises:
        UsageError: see `open`.
    """

    def __init__(self, out: Path, inputs: dict[str, Any], processes: Processes = ALONE) -> None:
        self._processes = processes
        self.folder = out.with_name(out.name + ".partial")
        self._out = out
        self._inputs = inputs
        self._lock: int | None = None
        self._opened = False
        self._done = False

    @property
    def log(self) -> Path:
        """The log file."""
        return self.folder / LOG

    @property
    def final(self) -> Path:
        """Where the trained weights go, once training is over."""
        return self.folder / FINAL

    @property
    def last(self) -> Path:
        """Where the last weights go, if those of the result are an average of them and others."""
        return self.folder / f"{FINAL}-last"

    @property
    def kept_adapter(self) -> Path:
        """Where an adapter goes that is folded into the result and kept beside it."""
        return self.folder / f"{FINAL}-adapter"

    def open(self, *, resume: bool, overwrite: bool) -> Saved | None:
        """Make the folder, or take up the one that is there; return the state to go on from, if any.

        Raises:
            UsageError: there is one, and it has other inputs, is in use, or neither flag says what to do with it.
        """
        return self._processes.first(lambda: self._open(resume=resume, overwrite=overwrite))

    def _open(self, *, resume: bool, overwrite: bool) -> Saved | None:
        # Cut off inside a call that makes the folder, nobody would know that it is there.
        with uninterrupted(), clear_os_errors(self.folder):
            is_left = self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
            if is_left and not (resume or overwrite):
                raise UsageError(
                    f"{self.folder}: an earlier run stopped here; "
                    "add --resume to go on with it, or --overwrite to start afresh."
                )
            known = resume and (self.folder / _STARTED).exists()
            if known:
                self._require_same()
            self._opened = True
        with clear_os_errors(self.folder):
            if known:
                return self._clean()
            for path in self.folder.iterdir():
                _remove(path)
            write_object(self.folder / _STARTED, self._inputs)
        return None

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        with uninterrupted():
            if self._done or (self._opened and not self.has_state):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    @property
    def has_state(self) -> bool:
        """Whether there is anything to go on from."""
        return any((path / _SEAL).exists() for path in self.folder.glob("*"))  # of a folder that is gone none

    def finish(self) -> None:
        """The result is out: the folder goes."""
        self._done = True

    def discard(self) -> None:
        """Remove what a run left behind that was killed when its result was already out."""
        self._processes.first(self._discard)

    def _discard(self) -> None:
        remove_dead_runs(Path(os.path.realpath(self._out)))  # what the result replaced
        started = read_object(self.folder / _STARTED)  # nothing is left of it if the kill came while all was removed
        if not self.folder.is_dir() or (started and started != self._inputs):
            return
        with contextlib.suppress(UsageError), self:
            self._take()
            self.finish()

    def seal(self, path: Path, step: int, seconds: float) -> None:
        """Declare the files of ``path`` complete, once all processes have written theirs."""
        self._processes.wait()
        if not self._processes.is_first:
            return
        folders = [path, self.last, self.kept_adapter] if path == self.final else [path]
        written = [one for folder in folders for one in sorted(folder.rglob("*")) if one.is_file()]
        files = {os.path.relpath(one, path): file_digest(one) for one in written if one.name != _SEAL}
        if path == self.final:
            sync_tree(self.folder)  # what it was made from goes next
        write_object(path / _SEAL, {"step": step, "seconds": round(seconds, 2), "files": files})

    def drop_checkpoints(self) -> None:
        """Remove all but the final state."""
        if not self._processes.is_first:
            return
        for path in self.folder.iterdir():
            if 0 <= _step_of(path) < float("inf"):
                _remove(path)

    def newest(self) -> Saved | None:
        """The newest checkpoint that is complete."""
        found = (_opened(path) for path in sorted(self.folder.iterdir(), key=_step_of, reverse=True))
        return next((saved for saved in found if saved is not None), None)

    def _take(self) -> None:
        """Lock the folder, and say in the lock who has it."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UsageError(
                f"{self.folder}: another run{holder} is working on this output; wait for it, or stop it."
            ) from None
        except OSError:
            pass  # a file system without locks, where nobody can tell
        self._lock = descriptor
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)

    def _require_same(self) -> None:
        started = read_object(self.folder / _STARTED)
        changed = differences(started, self._inputs)
        if changed:
            raise UsageError(
                f"{self.folder}: cannot be resumed, it was started with other settings: {'; '.join(changed)}. "
                "Give the same again, or start afresh with --overwrite."
            )

    def _clean(self) -> Saved | None:
        """Remove what stands after the newest complete state: a resumed run finds what an unbroken one would."""
        newest = self.newest()
        step = newest.step if newest else 0
        trained = newest is not None and newest.path == self.final
        for path in self.folder.iterdir():
            if trained and path in (self.last, self.kept_adapter):
                continue
            if path.is_dir() and (newest is None or path != newest.path) and not (0 <= _step_of(path) < step):
                _remove(path)
        _trim_log(self.log, step if newest else -1)
        return newest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the inputs of two runs, each as a few words."""
    found = []
    for key in sorted({*before, *now}):
        if key == READING and before.get(key) is None:
            continue  # an earlier ktmerge did not say
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [
                f"{name} was {old.get(name)}, now {new.get(name)}"
                for name in sorted({*old, *new})
                if old.get(name) != new.get(name)
            ]
        elif old != new:
            found.append(f"another {key}")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none."""
    try:
        return as_object(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def as_object(value: Any) -> dict[str, Any]:
    """A part of JSON that should be an object; empty if it is something else."""
    return value if isinstance(value, dict) else {}


def write_object(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    passing = path.with_name(path.name + ".new")
    with passing.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(passing, path)


def _opened(path: Path) -> Saved | None:
    seal = read_object(path / _SEAL)
    files = seal.get("files")
    if not isinstance(files, dict) or not files:
        return None
    try:
        intact = all(file_digest(path / name) == digest for name, digest in files.items())
    except KtmergeError:
        return None
    return Saved(path, int(seal["step"]), float(seal["seconds"])) if intact else None


def _holder(lock: int) -> str:
    """Who wrote into a lock that is held, in words; empty if it does not say."""
    process, _, host = os.pread(lock, 512, 0).decode(errors="replace").partition(" ")
    if not process.isdecimal():
        return ""
    return f" (process {process})" if host == socket.gethostname() else f" (process {process} on {host})"


def _step_of(path: Path) -> float:
    """The step of a checkpoint folder; infinite for the final one, -1 for anything else."""
    if path.name == FINAL:
        return float("inf")
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and one that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # a letter that was cut in two is one, too
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    write_whole(path, b"".join(kept))


def _remove(path: Path) -> None:
    if path.name == _LOCK:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
