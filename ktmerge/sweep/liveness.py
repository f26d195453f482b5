"""Which workers are alive: a mark of each process, signs of life, and who has given none for too long."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from ktmerge.checkpoints.signals import uninterrupted

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

WORKER, BEAT = "worker", "beat"
_BEATS = 6
"""Signs of life within the time after which a silent worker counts as dead."""


def mark() -> str:
    """This process, told from any other that ever ran: where, its number, when it began."""
    return f"{_place()}/{os.getpid()}/{_began(os.getpid())}"


def ended_here(other: str) -> bool:
    """Whether a mark is that of a process of this very machine that is no more."""
    place, _, process = other.partition("/")
    if place != _place():
        return False
    number, _, began = process.partition("/")
    return _began(int(number)) != began if number.isdigit() else False


class Watch:
    """Tells the trials of dead workers.

    A worker of this machine is dead when its process is; one of another, if its sign of life has not changed for the
    ``grace`` seconds that this process has looked. Clocks of different machines are never compared.
    """

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace, self._clock = grace, clock
        self._seen: dict[int, tuple[object, float]] = {}

    def is_lost(self, trial: FrozenTrial) -> bool:
        """Whether nobody works on a running trial any more."""
        sign = (trial.user_attrs.get(WORKER), trial.user_attrs.get(BEAT))
        if ended_here(str(sign[0])):
            return True
        now = self._clock()
        known, since = self._seen.get(trial._trial_id, (None, now))
        if known != sign:
            self._seen[trial._trial_id] = (sign, now)
            return False
        return now - since > self._grace


@contextmanager
def beating(give: Callable[[int], None], grace: float) -> Iterator[None]:
    """Give signs of life while the block runs."""
    done = Event()

    def run() -> None:
        count = 0
        while not done.wait(grace / _BEATS):
            count += 1
            with suppress(Exception):  # finished meanwhile, or a database away for a moment: the next one counts
                give(count)

    thread = Thread(target=run, daemon=True)
    try:
        with uninterrupted():
            thread.start()
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def _place() -> str:
    """A machine since it was started, and the processes in it that see one another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}-elsewhere-{os.getpid()}"


def _began(process: int) -> str:
    """When a process began, in ticks since the machine did; empty if there is none, or it is only not yet buried."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
