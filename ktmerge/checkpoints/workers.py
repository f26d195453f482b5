"""Threads that work side by side, and end with what they are for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from ktmerge.checkpoints.signals import uninterrupted

Result = TypeVar("Result")


class Workers(ThreadPoolExecutor):
    """A pool whose threads all end with it: a signal that comes while one of them begins waits for that.

    Left by an exception, it does not begin what waits.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def in_order(self, calls: Iterable[Callable[[], Result]], ahead: int) -> Iterator[Result]:
        """The results of calls in their order, as many more under way or done as ``ahead`` says."""
        running: deque[Future[Result]] = deque()
        for call in calls:
            running.append(self.submit(call))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _adjust_thread_count(self) -> None:
        if len(self._threads) < self._max_workers:  # for each of many small tasks, signals would cost more than those
            with uninterrupted():
                super()._adjust_thread_count()
