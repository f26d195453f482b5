"""Threads that work side by side, and end with what they are for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from ktmerge.checkpoints.signals import uninterrupted


class Workers(ThreadPoolExecutor):
    """A pool whose threads all end with it: a signal that comes while one of them begins waits for that.

    Left by an exception, it does not begin what waits.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def _adjust_thread_count(self) -> None:
        if len(self._threads) < self._max_workers:  # for each of many small tasks, signals would cost more than those
            with uninterrupted():
                super()._adjust_thread_count()
