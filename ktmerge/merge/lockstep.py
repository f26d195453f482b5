"""Several computations in lockstep: what all of them ask for next is answered in one call.

Each has a thread of its own, of which one runs at a time. So a question can come from any depth of a computation that
knows nothing of the others, and what is asked together does not depend on the machine. Loads no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

Answer = Callable[[list[Any]], list[Any]]
"""Answers several questions, in their order."""

_own = threading.local()


class _Stopped(BaseException):
    """Ends a computation because another one failed."""


class _Task:
    """One computation.

    Attributes:
        asked: what it waits for; nothing once it has ended.
        result: what it came to.
    """

    def __init__(self, work: Callable[[], Any], inside: Callable[[], AbstractContextManager[Any]]) -> None:
        self.asked: list[Any] = []
        self.result: Any = None
        self._work = work
        self._inside = inside
        self._replies: list[Any] = []
        self._stopped = False
        self._error: BaseException | None = None
        self._turn, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> None:
        """Run to the first question, or to the end."""
        self._thread.start()
        self._wait()

    def go_on(self, replies: list[Any]) -> None:
        """Run to the next question, or to the end."""
        self._replies = replies
        self._turn.release()
        self._wait()

    def stop(self) -> None:
        """Have it end where it waits for an answer, or would."""
        self._stopped = True
        self._turn.release()

    def ask(self, questions: list[Any]) -> list[Any]:
        """Wait for the answers; from within."""
        self.asked = questions
        self._paused.release()
        self._turn.acquire()
        self.asked = []
        if self._stopped:
            raise _Stopped
        return self._replies

    def _wait(self) -> None:
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        _own.task = self
        try:
            with self._inside():
                self.result = self._work()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._paused.release()


def ask(questions: list[Any], answer: Answer) -> list[Any]:
    """The answers, together with those to others in lockstep; at once where there are none."""
    task: _Task | None = getattr(_own, "task", None)
    return answer(questions) if task is None else task.ask(questions)


def lockstep(
    work: Callable[[Any], Any], items: Sequence[Any], answer: Answer, inside: Callable[[], AbstractContextManager[Any]]
) -> list[Any]:
    """``[work(item) for item in items]``, with what they `ask` for answered together; may be nested.

    Args:
        work: any function.
        items: one of each computation.
        answer: to the questions of all; of the outermost lockstep, to those of all within.
        inside: gives a context for every computation to run in.

    Raises:
        whatever one of them raises; the others end.
    """
    tasks = [_Task(partial(work, item), inside) for item in items]
    try:
        for task in tasks:
            task.begin()
        while waiting := [task for task in tasks if task.asked]:
            replies = ask([question for task in waiting for question in task.asked], answer)
            for task in waiting:
                own, replies = replies[: len(task.asked)], replies[len(task.asked) :]
                task.go_on(own)
    finally:
        for task in tasks:
            task.stop()
    return [task.result for task in tasks]
