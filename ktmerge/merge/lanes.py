"""The ways between host and device: copies up, arithmetic and copies down go on at once, beside reading and writing.

A device works off queues ("streams") by itself; events hold one back until another is there. Nothing here knows what
the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from ktmerge.checkpoints.workers import Workers
from ktmerge.errors import KtmergeError, first_line

SLOT = 8 << 20
"""Bytes of a pinned buffer; a multiple of every type's width."""
_SLOTS = 6
"""Pinned buffers in each direction: while one is filled and one is emptied, others are on their way."""

Stream = Any
"""A queue of work on a device; what it is, the device knows."""


class Event(Protocol):
    """A mark in a stream."""

    def record(self, stream: Stream) -> None:
        """Set the mark behind all that was given to the stream so far."""

    def wait(self, stream: Stream) -> None:
        """Let what is given to this stream from now on wait for the mark."""

    def synchronize(self) -> None:
        """Wait here for the mark; for nothing if it was never set."""


class Device(Protocol):
    """What lanes ask of a device."""

    device: torch.device

    def stream(self) -> Stream:
        """A new one."""

    def current(self) -> Stream:
        """The one that takes this thread's work."""

    def using(self, stream: Stream) -> AbstractContextManager[Any]:
        """This thread's arithmetic and allocations go to a stream."""

    def event(self) -> Event: ...

    def pinned(self, size: int) -> Tensor:
        """So many bytes of host memory that copies can be made from and to while the host goes on."""

    def empty(self, count: int, dtype: torch.dtype, stream: Stream) -> Tensor:
        """Room on the device; once given up, what the stream is given afterwards may use it."""

    def hold(self, values: Tensor, stream: Stream) -> None:
        """Once given up, ``values`` may not be used again before what another stream was given until then is done."""

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        """Give a copy to the stream, one of the two being on the device and the other pinned."""


class Cuda:
    """A CUDA device, as ``cuda`` or ``cuda:1``."""

    def __init__(self, name: str) -> None:
        index = torch.device(name).index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def current(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    def using(self, stream: Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def event(self) -> Event:
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, count: int, dtype: torch.dtype, stream: Stream) -> Tensor:
        with self.using(stream):
            return torch.empty(count, dtype=dtype, device=self.device)

    def hold(self, values: Tensor, stream: Stream) -> None:
        values.record_stream(stream)

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        with self.using(stream):
            target.copy_(source, non_blocking=True)


@dataclass(frozen=True)
class Load:
    """Elements to be brought up.

    Attributes:
        fill: writes the bytes of the elements from a given one on.
    """

    fill: Callable[[int, memoryview], None]
    count: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Coming:
    """Tensors on their way up, all of which are there at ``ready``."""

    values: Sequence[Tensor]
    ready: Event


class _Slot:
    """A pinned buffer, free for the next once the copy from or to it is ``done``."""

    def __init__(self, device: Device, size: int) -> None:
        self.bytes = device.pinned(size)
        self.memory = self.bytes.numpy().data
        self.done = device.event()


class Lanes:
    """Context manager of the ways to and from one device. Arithmetic goes to the stream that is current at the start.

    All methods may be called from any thread; the pinned buffers are the only host memory they take.

    Args:
        device: what they lead to.

    Raises:
        KtmergeError: the device cannot be used.
    """

    def __init__(self, device: Device) -> None:
        self.device = device.device
        self._device, self._size = device, SLOT
        try:
            self._arithmetic = device.current()
            self._up, self._down = device.stream(), device.stream()
            with device.using(self._arithmetic):
                self._slots = [_Slot(device, SLOT) for _ in range(2 * _SLOTS)]
        except RuntimeError as error:
            raise KtmergeError(
                f"{self.device}: cannot be used ({first_line(error)}); use --device cpu, to the same bytes."
            ) from error
        self._upward: SimpleQueue[_Slot] = SimpleQueue()
        self._downward: SimpleQueue[_Slot] = SimpleQueue()
        for number, one in enumerate(self._slots):
            (self._upward if number % 2 else self._downward).put(one)
        self._writer = Workers(1, "write")

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()
        for slot in self._slots:
            slot.done.synchronize()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """This thread's arithmetic goes to the device.

        Raises:
            KtmergeError: its memory is full.
        """
        try:
            with self._device.using(self._arithmetic):
                yield
        except torch.OutOfMemoryError as error:
            raise KtmergeError(
                f"{self.device}: out of memory; free some of it, choose another device, or use --device cpu, "
                "to the same bytes."
            ) from error

    def upload(self, loads: Sequence[Load]) -> Coming:
        """Bring elements up, buffer by buffer; returns as soon as all of them were read."""
        values = [self._device.empty(load.count, load.dtype, self._up) for load in loads]
        for load, target in zip(loads, values, strict=True):
            room = target.view(torch.uint8)
            for begin in range(0, room.numel(), self._size):
                self._send(load, begin // load.dtype.itemsize, room[begin : begin + self._size])
        ready = self._device.event()
        ready.record(self._up)
        return Coming(values, ready)

    def receive(self, coming: Coming) -> Sequence[Tensor]:
        """What was brought up, for arithmetic that is asked for from now on."""
        coming.ready.wait(self._arithmetic)
        for values in coming.values:
            self._device.hold(values, self._arithmetic)
        return coming.values

    def download(self, values: Tensor, take: Callable[[memoryview, int], None]) -> list[Future[None]]:
        """Bring ``values`` down, which stay as they are; another thread calls ``take(bytes, first byte)``."""
        data = values.reshape(-1).view(torch.uint8)
        ready = self._device.event()
        ready.record(self._arithmetic)
        ready.wait(self._down)
        return [self._fetch(data[begin : begin + self._size], begin, take) for begin in range(0, len(data), self._size)]

    def _send(self, load: Load, start: int, target: Tensor) -> None:
        slot = self._upward.get()
        try:
            slot.done.synchronize()
            load.fill(start, slot.memory[: len(target)])
            self._device.copy(target, slot.bytes[: len(target)], self._up)
            slot.done.record(self._up)
        finally:
            self._upward.put(slot)

    def _fetch(self, data: Tensor, begin: int, take: Callable[[memoryview, int], None]) -> Future[None]:
        slot = self._downward.get()
        try:
            self._device.copy(slot.bytes[: len(data)], data, self._down)
            slot.done.record(self._down)
            return self._writer.submit(self._hand_over, slot, data, begin, take)
        except BaseException:
            self._downward.put(slot)
            raise

    def _hand_over(self, slot: _Slot, data: Tensor, begin: int, take: Callable[[memoryview, int], None]) -> None:
        """Until the copy is there, ``data`` keeps its room on the device."""
        try:
            slot.done.synchronize()
            take(slot.memory[: len(data)], begin)
        finally:
            self._downward.put(slot)
