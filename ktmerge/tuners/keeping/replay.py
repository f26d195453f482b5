"""Replay: so many upstream samples in every batch, the same ones whenever the run is started or gone on with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ktmerge.tuners.keys import keyed


class ReplaySampler(Sampler[int]):
    """Orders two data sets, the second behind the first, so that every ``batch`` of indices has both.

    The new samples are shuffled anew in every epoch and each seen once; the replayed ones go round and round, shuffled
    anew in every round, over the ends of epochs. The last batch of an epoch has fewer new ones, and as many replayed.

    Args:
        new, old: samples of the first and of the second set.
        batch: samples of a batch.
        replayed: how many of them are replayed; at least 1, less than ``batch``.
        seed: of both orders.
    """

    def __init__(self, new: int, old: int, batch: int, replayed: int, seed: int) -> None:
        self._new, self._old, self._fresh, self._replayed, self._seed = new, old, batch - replayed, replayed, seed
        self._epoch = 0

    @property
    def batches(self) -> int:
        """In an epoch."""
        return -(-self._new // self._fresh)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._new + self.batches * self._replayed

    def __iter__(self) -> Iterator[int]:
        order = _shuffled(self._new, self._seed, "new", self._epoch)
        position = self._epoch * self.batches * self._replayed
        rounds: dict[int, list[int]] = {}
        for first in range(0, self._new, self._fresh):
            yield from order[first : first + self._fresh]
            for place in range(position, position + self._replayed):
                round_, inside = divmod(place, self._old)
                if round_ not in rounds:
                    rounds[round_] = _shuffled(self._old, self._seed, "replayed", round_)
                yield self._new + rounds[round_][inside]
            position += self._replayed


def _shuffled(count: int, seed: int, what: str, round_: int) -> list[int]:
    generator = torch.Generator().manual_seed(keyed(seed, "replay", what, str(round_)))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
