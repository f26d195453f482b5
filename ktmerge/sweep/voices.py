"""What the workers of a sweep say, on one terminal: each thing once, by the worker that said it first."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Lock
from typing import Any

from ktmerge.progress import SILENT, Progress, Step, Unit


class Voice:
    """The progress of one worker, whose notes, and Python's warnings while it `speaks`, others make known.

    Args:
        say: takes a note.
        tasks: where it reports how far it is.
    """

    def __init__(self, say: Callable[[str], None], tasks: Progress = SILENT) -> None:
        self._say, self._tasks = say, tasks

    def task(self, description: str, total: float | None, unit: Unit = "items") -> AbstractContextManager[Step]:
        return self._tasks.task(description, total, unit)

    def note(self, text: str) -> None:
        self._say(text)

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Warnings are notes while the block runs."""

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            self._say(f"{category.__name__}: {message}")

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield


class Chorus:
    """All workers together; ``first`` is the voice of the one in this process, which draws how far it is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._said: set[str] = set()
        self._lock = Lock()
        self.first = Voice(lambda text: self._say(1, text), progress)

    def listen(self, worker: int, process: BaseProcess, notes: Connection[Any, str]) -> None:
        """Make known what a process says, and that it died, until it is no more."""
        with suppress(EOFError, OSError):
            while True:
                self._say(worker, notes.recv())
        process.join()
        if code := process.exitcode:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._say(worker, f"died ({how}); what it had begun is taken up by the others.")

    def end(self) -> None:
        """Say nothing more."""
        with self._lock:
            self._progress = SILENT

    def _say(self, worker: int, text: str) -> None:
        with self._lock:
            if text not in self._said:
                self._said.add(text)
                self._progress.note(f"worker {worker}: {text}")
