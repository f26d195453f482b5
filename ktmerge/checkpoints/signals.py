"""Steps that a signal must not cut in two, and the terminal that hangs up."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a process to stop."""


def answer_stopping(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Have ``handler`` answer what asks to stop, but no SIGHUP that is ignored, as nohup has it; what did before."""
    asked = [one for one in STOPPING if one != signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in asked}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the end: a thread started by then belongs to somebody who will stop it.

    `Thread.start` waits for the thread, on a busy machine for long; interrupted, it leaves one that cannot be joined.
    What is made inside must be written down inside, too: a signal that waited is raised by this very block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    with _waiting(signal.SIGINT), _waiting(signal.SIGTERM), _waiting(signal.SIGHUP):
        yield


def leave_terminal() -> None:
    """Write nowhere what would go to a terminal: one that has hung up answers with an error, which ends the run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # what was a terminal no longer says that it is one
                os.dup2(nowhere, descriptor)
        except OSError:
            continue  # it was closed before
    os.close(nowhere)


@contextmanager
def _waiting(number: signal.Signals) -> Iterator[None]:
    """Let one signal wait; the handler comes back even if the other one is heard at the same time."""
    handler = signal.getsignal(number)
    if handler is None:
        yield  # it is not Python's
        return
    arrived: list[int] = []
    try:
        signal.signal(number, lambda one, frame: arrived.append(one))
        yield
    finally:
        signal.signal(number, handler)
        if arrived:
            signal.raise_signal(number)
