"""A device that is none: what its streams are given runs late, in any order that streams and events still allow.

Room that was given up is overwritten as soon as somebody else might have got it. So a wait that is missing, or a buffer
used again too early, shows in the bytes.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

POISON = 0xA5
HURRIES = (0.0, 0.5, 1.0)


class Mark:
    """A place in a stream, reached or not; None: in none."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream, self.reached = stream, stream is None


class Stream:
    """Work in order: functions, and marks of other streams to wait for.

    Attributes:
        hurry: how likely it does the next piece before anybody waits for it.
    """

    def __init__(self, hurry: float) -> None:
        self.work: deque[Callable[[], Any] | Mark] = deque()
        self.hurry = hurry

    def able(self) -> bool:
        """Whether there is something to do that need not wait."""
        return bool(self.work) and not (isinstance(self.work[0], Mark) and not self.work[0].reached)

    def step(self) -> None:
        """Do the next piece of work, and before it what that waits for elsewhere."""
        work = self.work.popleft()
        if not isinstance(work, Mark):
            work()
        elif work.stream is not None:
            work.stream.reach(work)

    def reach(self, mark: Mark) -> None:
        """Do what a mark in this stream needs, and no more."""
        while not mark.reached:
            self.step()


class Late:
    """See `ktmerge.merge.lanes.Device`.

    Args:
        seed: of the order in which work is done.
        eager: arithmetic is the host's, and done at once.
        without: what is left out: the name of the function of `Lanes` in which an event's method, or a method of the
            device, does nothing, and which method: e.g. ``receive wait``.
    """

    def __init__(self, seed: int, *, eager: bool = False, without: str = "") -> None:
        self.device = torch.device("cpu")
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.without = without
        self.eager = eager
        self.streams: list[Stream] = []
        self.reuses: list[Stream] = []
        self.arithmetic = self.stream()
        self.rooms: list[np.ndarray[Any, Any]] = []
        self.freed: dict[int, tuple[Stream, list[Stream]]] = {}

    def stream(self) -> Stream:
        self.streams.append(Stream(self.random.choice(HURRIES)))
        return self.streams[-1]

    def current(self) -> Stream:
        return self.arithmetic

    def using(self, stream: Stream) -> AbstractContextManager[Any]:
        return nullcontext()

    def event(self) -> Event:
        return Event(self)

    def pinned(self, size: int) -> Tensor:
        return torch.from_numpy(self._room(size))

    def empty(self, count: int, dtype: torch.dtype, stream: Stream) -> Tensor:
        """Room that is watched: once nobody holds it, it is overwritten when its stream comes to that."""
        room = self._room(count * dtype.itemsize)
        seen = room[:]  # what torch holds for as long as it uses the memory
        address, size = room.ctypes.data, room.size
        self.freed[address] = stream, []
        weakref.finalize(seen, self._give_up, address, size).atexit = False
        return torch.from_numpy(seen).view(dtype)

    def hold(self, values: Tensor, stream: Stream) -> None:
        if not self.leaves_out("hold"):
            self.freed[values.data_ptr()][1].append(stream)

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        to, where, size = target.data_ptr(), source.data_ptr(), source.nbytes  # and no hold on either
        self.give(stream, lambda: ctypes.memmove(to, where, size))

    def give(self, stream: Stream, work: Callable[[], Any] | Mark) -> None:
        """Give work to a stream; some of all that there is may be done at once."""
        with self.lock:
            stream.work.append(work)
            while self.eager and self.arithmetic.work:
                self.arithmetic.step()
            busy = [one for one in (*self.streams, *self.reuses) if one.work]
            for one in self.random.sample(busy, len(busy)):
                while one.able() and self.random.random() < one.hurry:
                    one.step()
            self.reuses = [one for one in self.reuses if one.work]

    def reach(self, mark: Mark) -> None:
        """Wait for a mark."""
        if mark.stream is not None:
            mark.stream.reach(mark)

    def leaves_out(self, method: str) -> bool:
        """Whether the function of `Lanes` that calls is to go without."""
        return self.without == f"{sys._getframe(2).f_code.co_name} {method}"

    def _room(self, size: int) -> np.ndarray[Any, Any]:
        room = np.full(max(size, 1), POISON, np.uint8)[:size]
        self.rooms.append(room)
        return room

    def _give_up(self, address: int, size: int) -> None:
        with self.lock:
            own, others = self.freed.pop(address)
            reuse = Stream(self.random.choice(HURRIES))
            for stream in (own, *others):
                event = Event(self)
                event.record(stream)
                reuse.work.append(event.mark)
            self.reuses.append(reuse)
            self.give(reuse, lambda: ctypes.memset(address, POISON, size))


class Event:
    """See `ktmerge.merge.lanes.Event`."""

    def __init__(self, device: Late) -> None:
        self.device, self.mark = device, Mark(None)

    def record(self, stream: Stream) -> None:
        if not self.device.leaves_out("record"):
            mark = self.mark = Mark(stream)
            self.device.give(stream, lambda: setattr(mark, "reached", True))

    def wait(self, stream: Stream) -> None:
        if not self.device.leaves_out("wait"):
            self.device.give(stream, self.mark)

    def synchronize(self) -> None:
        if not self.device.leaves_out("synchronize"):
            with self.device.lock:
                self.device.reach(self.mark)
