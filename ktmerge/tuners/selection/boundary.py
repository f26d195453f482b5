"""The exact k largest of scores that are spread over many tensors, in passes over them: nothing is held but counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ktmerge.tuners.sharding import add_up, before

_HALF = 1 << 16
_CHUNK = 1 << 22
"""Elements looked at together."""


def select_largest(
    scores: Callable[[str], Tensor], sizes: Mapping[str, int], count: int, noise: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Masks of exactly ``count`` elements with the largest scores among all tensors.

    The threshold is found by two passes that count, over the upper and the lower half of a 32-bit key that orders fp32
    numbers as they are ordered; two more decide between equal scores, if there are too many. Scores are asked for anew
    in every pass, so that those of one tensor are in memory at a time. Of several processes each has a run of every
    tensor, in their order; counts are added up, so all find the threshold that one would.

    Args:
        scores: the scores of a tensor, fp32, flat, on the host; the same numbers every time.
        sizes: elements of each tensor; of several processes, those that this one has.
        count: how many to select, in all.
        noise: numbers that decide between equal scores, int32, flat; the larger wins, then the first.

    Returns:
        bool masks, flat, by name.
    """
    if count >= int(add_up(torch.tensor(sum(sizes.values())))):
        return {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
    if count <= 0:
        return {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
    floor, above, equal = _kth(lambda: (ordered(scores(name)) for name in sizes), count)
    wanted = count - above
    masks = {}
    if equal == wanted:
        return {name: ordered(scores(name)) >= floor for name in sizes}
    tied = _Tied(scores, noise, floor)
    least, over, _ = _kth(lambda: map(tied.noise_of, sizes), wanted)
    left = wanted - over
    for name in sizes:
        keys = ordered(scores(name))
        mask = masks[name] = keys > floor
        places = (keys == floor).nonzero().squeeze(1)
        if not int(add_up(torch.tensor(len(places)))):
            continue
        luck = noise(name)[places]
        mask[places[luck > least]] = True
        last = places[luck == least]
        mine = last[: max(0, left - before(len(last)))]
        mask[mine] = True
        left -= int(add_up(torch.tensor(len(mine))))
    return masks


class _Tied:
    """The noise of those elements whose score is the threshold."""

    def __init__(self, scores: Callable[[str], Tensor], noise: Callable[[str], Tensor], floor: int) -> None:
        self._scores, self._noise, self._floor = scores, noise, floor

    def noise_of(self, name: str) -> Tensor:
        tied = ordered(self._scores(name)) == self._floor
        return self._noise(name)[tied] if bool(tied.any()) else torch.zeros(0, dtype=torch.int32)


def ordered(scores: Tensor) -> Tensor:
    """int32 keys that are ordered as the fp32 scores are; both zeros are equal."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _kth(streams: Callable[[], Iterable[Tensor]], count: int) -> tuple[int, int, int]:
    """The ``count``-th largest int32 key, how many are larger, and how many equal it."""
    upper = _counts((key >> 16) + _HALF // 2 for key in _chunks(streams()))
    high, above = _place(upper, count)
    lower = _counts((key & (_HALF - 1))[(key >> 16) == high - _HALF // 2] for key in _chunks(streams()))
    low, further = _place(lower, count - above)
    return ((high - _HALF // 2) << 16) | low, above + further, int(lower[low])


def _chunks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        for start in range(0, tensor.numel(), _CHUNK):
            yield tensor[start : start + _CHUNK]


def _counts(digits: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(_HALF, dtype=torch.int64)
    for one in digits:
        total += torch.from_numpy(np.bincount(one.numpy(), minlength=_HALF))  # four times as fast as torch's
    return add_up(total)


def _place(counts: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the ``count``-th largest, and how many are in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, count))
    above = int(from_top[position - 1]) if position else 0
    return _HALF - 1 - position, above
