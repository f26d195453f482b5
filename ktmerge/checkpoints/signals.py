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
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread() or None in handlers.values():
        yield  # only the main thread is interrupted; None is a handler that is not Python's
        return
    arrived: list[int] = []
    for number in handlers:
        signal.signal(number, lambda one, frame: arrived.append(one))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in arrived:
            signal.raise_signal(one)
