"""The torch reference of the selection by magnitude: counts for the search, and what the threshold keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ktmerge.merge.kernels.search import Interval, Search, Threshold
from ktmerge.merge.kernels.splitmix import at_least, hashes, signed
from ktmerge.merge.stage import Context

_MAGNITUDE = 0x7FFFFFFF


class MagnitudeThreshold:
    """Observer that finds the threshold of the ``keep`` largest magnitudes among ``elements``.

    Works over one tensor's pieces or over all tensors of an expert.

    Args:
        keep: how many to keep.
        elements: how many there are.
        key: the hash's key for a tensor, from its context.
    """

    def __init__(self, keep: int, elements: int, key: Callable[[Context], int]) -> None:
        self._search = Search(keep, elements)
        self._key = key

    @property
    def done(self) -> bool:
        return self._search.done

    def observe(self, values: Tensor, context: Context) -> None:
        flat = values.reshape(-1)
        self._search.add(context.kernels.count(flat, self._key(context), context.start, self._search.interval).numpy())

    def end_pass(self) -> None:
        self._search.end_pass()

    def result(self) -> Threshold:
        return self._search.result()


def count(delta: Tensor, key: int, start: int, interval: Interval) -> Tensor:
    """Elements in each bin of the interval, and above it last: int64 ``[bins + 1]`` on the host."""
    bits = magnitude_bits(delta)
    if not interval.hashed:
        high = interval.low + interval.last
        near = bits[(bits >= interval.low) & (bits <= high)]
        counts = torch.bincount((near - interval.low) >> interval.shift, minlength=interval.bins + 1)
        counts[-1] = torch.count_nonzero(bits > high)
        return counts.cpu()
    tied = (bits == interval.floor).nonzero().squeeze(1) + start
    keys = hashes(key, tied)
    inside = keys[at_least(keys, interval.low)] - signed(interval.low)  # wraps to the unsigned difference
    beyond = at_least(inside, interval.last + 1) if interval.last + 1 < 1 << 64 else torch.zeros_like(inside).bool()
    digits = (inside >> interval.shift) & _MASKS[interval.shift]
    return torch.bincount(torch.where(beyond, interval.bins, digits), minlength=interval.bins + 1).cpu()


def keep(delta: Tensor, key: int, start: int, threshold: Threshold) -> Tensor:
    """``delta`` with everything below the threshold set to zero; what stays is unchanged."""
    if threshold.keeps_all:
        return delta
    if threshold.keeps_none:
        return torch.zeros_like(delta)
    bits = magnitude_bits(delta)
    kept = bits >= threshold.floor
    if threshold.least:
        tied = (bits == threshold.floor).nonzero().squeeze(1)
        kept[tied] = at_least(hashes(key, tied + start), threshold.least)
    return torch.where(kept, delta, 0.0)


def magnitude_bits(delta: Tensor) -> Tensor:
    """The 31-bit pattern of each fp32 magnitude, int32: it orders magnitudes."""
    return delta.view(torch.int32) & _MAGNITUDE


_MASKS = [(1 << (64 - shift)) - 1 if shift else -1 for shift in range(64)]
"""What remains of 64 bits after a shift to the right that fills with the sign."""
