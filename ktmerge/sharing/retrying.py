"""Calls over the net, made again when the other side says it is busy or broken for the moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from ktmerge.errors import KtmergeError

Answer = TypeVar("Answer")

ATTEMPTS = 5
PASSING = frozenset({408, 412, 429, 500, 502, 503, 504})
"""What the other side says that may be over soon; 412: somebody else was faster."""
_LONGEST = 120.0
"""Seconds that are waited at the other side's wish; one that wants more is told of."""
_FIRST = 0.5


def retried(call: Callable[[], Answer], where: str, attempts: int = ATTEMPTS, *, broken: bool = True) -> Answer:
    """What ``call`` gives, in several attempts.

    Args:
        call: may be made again, whatever became of the last time.
        where: the other side is called in messages.
        attempts: at most.
        broken: whether a broken connection is reason for another, too.

    Raises:
        KtmergeError: the other side wants a longer pause than anyone waits for.
        Exception: what the last attempt raised, or an earlier one that no further attempt would better.
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            pause = _pause(error, attempt, where, broken)
            if pause is None or attempt == attempts - 1:
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error tells of; of errors of huggingface_hub that hide it, of their cause."""
    seen: BaseException | None = error
    while seen is not None:
        code = getattr(getattr(seen, "response", None), "status_code", getattr(seen, "code", None))
        if isinstance(code, int):
            return code
        seen = seen.__cause__
    return None


def _pause(error: BaseException, attempt: int, where: str, broken: bool) -> float | None:
    """Seconds until the next attempt; None: there is no use in one."""
    code = status_of(error)
    if not (code in PASSING if code is not None else broken and is_of_the_net(error)):
        return None
    asked = _asked(error)
    if asked is not None and asked > _LONGEST:
        raise KtmergeError(f"{where}: is busy (HTTP {code}) and asks to be left for {asked:.0f} seconds.") from error
    return _FIRST * 2**attempt if asked is None else asked


def is_of_the_net(error: BaseException) -> bool:
    """Whether an error came from the connection; libraries have types of their own for that."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "URLError", "ConnectionError", "TimeoutError", "IncompleteRead"})


def _asked(error: BaseException) -> float | None:
    """Seconds of a ``Retry-After``."""
    seen: BaseException | None = error
    while seen is not None:
        headers: Any = getattr(getattr(seen, "response", None), "headers", getattr(seen, "headers", None))
        text = headers.get("Retry-After") if headers is not None else None
        if text is not None:
            return _seconds(str(text).strip())
        seen = seen.__cause__
    return None


def _seconds(text: str) -> float | None:
    """How long to wait: as a number, or until a date; None: it is neither."""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
