"""What can go wrong, as types. One sentence each: what is wrong, where, what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Found = TypeVar("Found")

_LONGEST, _MOST_LINES = 20_000, 500
"""Letters of a line, and lines, that a message has at most."""


class KtmergeError(Exception):
    """The run failed for a reason ktmerge understands. The command line prints it without a traceback.

    A message may quote a stranger's file; what could steer a terminal, or cannot be written to one, is shown escaped,
    and what nobody would read to its end is cut short.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        lines = [line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..." for line in message.split("\n")]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES - 1 :] = ["... and more."]
        super().__init__(printable_lines("\n".join(lines)))


class UsageError(KtmergeError):
    """The input is at fault (a key, a file, a tensor); nothing was started and nothing was lost."""

    exit_code = 2


class ToldElsewhereError(KtmergeError):
    """Another process of the run failed, and says why; nothing is left to be said here."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the run failed.")
        self.exit_code = exit_code


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put ``where`` before each line of what the block complains about."""
    try:
        yield
    except UsageError as error:
        raise UsageError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Keep what the block complains about for later, line by line; see `refuse`."""
    try:
        yield
    except UsageError as error:
        problems += str(error).splitlines()


def attempt(problems: list[str], find: Callable[[], Found]) -> Found | None:
    """What ``find`` gives; what it complains about is kept for later."""
    with collected(problems):
        return find()
    return None


def refuse(problems: Iterable[str]) -> None:
    """Raise UsageError with all that is wrong, each thing once, if anything is."""
    lines = list(dict.fromkeys(problems))
    if lines:
        raise UsageError("\n".join(lines))


def did_you_mean(wrong: str, valid: Iterable[str], *, list_all: bool = True) -> str:
    """Return `` Did you mean 'x'?`` or, with nothing near, `` Valid: a, b, c.``; empty if there is nothing to say.

    Args:
        wrong: the name that was refused.
        valid: the names there are.
        list_all: whether to list them when none is near; not where there may be hundreds.
    """
    import difflib  # only messages need it

    names = sorted(valid)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Valid: {', '.join(names)}." if names and list_all else ""


def printable(text: str) -> str:
    """A stranger's words in one line: what could steer a terminal, or cannot be written to one, is shown escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def printable_lines(text: str) -> str:
    """The same of a text of several lines, which stay apart."""
    return "\n".join(map(printable, text.split("\n")))


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
