"""Bytes go up, are worked on and come down while all else goes on, and none gets into another's place."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from merge_device import Late

import ktmerge.merge.lanes
from ktmerge.merge.lanes import Coming, Lanes, Load

SEEDS = range(25)
WAITS = [
    "receive wait", "receive hold", "download record", "download wait", "upload record", "_send synchronize",
    "_send record", "_fetch record", "_hand_over synchronize",
]  # fmt: skip


def add(device: Late, tensors: list[torch.Tensor]) -> torch.Tensor:
    """What a GPU does of an addition: the sum is there when the stream comes to it."""
    out = device.empty(tensors[0].numel(), torch.uint8, device.arithmetic)
    size = out.numel()
    rooms = {room.ctypes.data: room for room in device.rooms}
    sources, target = [rooms[one.data_ptr()][:size] for one in tensors], rooms[out.data_ptr()]
    device.give(device.arithmetic, lambda: np.add(sources[0], sources[1], out=target))
    return out


def through(device: Late, *, forget: bool = False) -> bool:
    """Whether the sums of a few pieces are right: each is read while the one before is added."""
    choice = random.Random(3)
    pieces = [
        [np.array(choice.choices(range(256), k=size), np.uint8) for _ in range(2)]
        for size in choice.choices(range(1, 90), k=12)
    ]
    leaving: list[Future[None]] = []
    found: list[bytearray] = [bytearray(pair[0].size) for pair in pieces]

    def load(values: Any) -> Load:
        def fill(start: int, target: memoryview) -> None:
            target[:] = values[start : start + len(target)].tobytes()

        return Load(fill, values.size, torch.uint8)

    def work(coming: Coming, number: int) -> None:
        def take(data: memoryview, begin: int) -> None:
            found[number][begin : begin + len(data)] = data

        leaving.extend(lanes.download(add(device, list(lanes.receive(coming))), take))

    with patch.object(ktmerge.merge.lanes, "SLOT", 16), Lanes(device) as lanes:
        if forget:
            submit = lanes._writer.submit
            lanes._writer.submit = lambda run, slot, data, *rest: submit(run, slot, range(len(data)), *rest)  # type: ignore[assignment,misc]
        coming = lanes.upload([load(one) for one in pieces[0]])
        for number in range(len(pieces)):
            now = coming
            if number + 1 < len(pieces):
                coming = lanes.upload([load(one) for one in pieces[number + 1]])
            work(now, number)
            del now
        for one in leaving:
            one.result()
    return all(bytes(own) == (pair[0] + pair[1]).tobytes() for own, pair in zip(found, pieces, strict=True))


def test_bytes_arrive_whatever_runs_first() -> None:
    assert all(through(Late(seed)) for seed in SEEDS[:10])


@pytest.mark.every(3)
@pytest.mark.parametrize("without", WAITS)
def test_every_wait_is_needed(without: str) -> None:
    assert not all(through(Late(seed, without=without)) for seed in SEEDS)


def test_what_comes_down_is_held_until_it_is_there() -> None:
    assert not all(through(Late(seed), forget=True) for seed in SEEDS)
