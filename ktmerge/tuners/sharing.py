"""How the processes of a run share the samples of every step: together they take those that one process would take.

Imports torch; import it only where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Sampler

from ktmerge.tuners.encode import Encoded


class SharedBatches(Sampler[list[int]]):
    """The batches of one process: in every step of an epoch as many as any other has.

    Where samples run short, at the end of an epoch, one stands in that teaches nothing (`Share`), since all processes
    must take part in every forward and backward pass.

    Args:
        order: of all samples; the same in every process.
        size: samples of a batch.
        passes: batches of a step.
        rank: of this process.
        count: of processes.
    """

    def __init__(self, order: Any, size: int, passes: int, rank: int, count: int) -> None:
        self._order, self._size, self._passes, self._rank, self._count = order, size, passes, rank, count

    @property
    def _step(self) -> int:
        return self._size * self._passes * self._count

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)

    @property
    def batch_sampler(self) -> SharedBatches:
        """Where the Trainer looks for `set_epoch`."""
        return self

    def __len__(self) -> int:
        return self._passes * -(-len(self._order) // self._step)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._order)
        for first in range(0, len(order), self._step):
            step = order[first : first + self._step]
            for number in range(self._passes):
                start = (number * self._count + self._rank) * self._size
                yield step[start : start + self._size] or [mute(step[0])]


class Share(Sequence[Encoded]):
    """Samples by index; by an index that was muted, one of which nothing is trained."""

    def __init__(self, samples: Sequence[Encoded]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        return self._samples[index] if index >= 0 else muted(self._samples[mute(index)])


def mute(index: int) -> int:
    """The index of the same sample with nothing to learn, and back."""
    return -index - 1


def muted(sample: Encoded) -> Encoded:
    """The sample with nothing to learn."""
    return replace(sample, trained=bytes(len(sample.trained)))
