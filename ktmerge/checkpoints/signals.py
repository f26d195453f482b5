"""Steps that a signal must not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the end: a thread started by then belongs to somebody who will stop it.

    `Thread.start` waits for the thread, on a busy machine for long; interrupted, it leaves one that cannot be joined.
    What is made inside must be written down inside, too: a signal that waited is raised by this very block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    with _waiting(signal.SIGINT), _waiting(signal.SIGTERM):
        yield


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
