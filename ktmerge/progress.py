"""How long work reports how far it is. Library code talks to the protocol; only the command line draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

Unit = Literal["bytes", "steps", "items"]


class Step(Protocol):
    """One piece of work under way."""

    def advance(self, amount: float = 1) -> None:
        """Say that ``amount`` more units are done."""


class Progress(Protocol):
    """Where work reports to."""

    def task(self, description: str, total: float | None, unit: Unit = "items") -> AbstractContextManager[Step]:
        """Open a piece of work of ``total`` units; ``None`` when it isn't known."""

    def note(self, text: str) -> None:
        """Say one line that a person at the terminal wants to see now."""


class _SilentStep:
    def advance(self, amount: float = 1) -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, description: str, total: float | None, unit: Unit = "items") -> Iterator[Step]:
        yield _SilentStep()

    def note(self, text: str) -> None:
        pass


SILENT: Progress = _Silent()
