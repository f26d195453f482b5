"""Exact selection of the k largest magnitudes, streaming, in fixed memory: a radix select on a 95-bit key.

The key of an element is the 31-bit pattern of its fp32 magnitude followed by a 64-bit hash of its position, so equal
magnitudes (a fifth of all elements in bf16 checkpoints) are decided by the hash, never by order. Each pass counts one
digit of the key among the elements that agree with the digits found so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ktmerge.merge.kernels.philox import words_at
from ktmerge.merge.stage import Context

WIDTHS = (16, 15, 16, 16, 16, 16)
"""Bits per digit, most significant first: two of the magnitude, four of the hash."""
_BINS = 1 << 16
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class Threshold:
    """The elements to keep are those whose key, cut to ``len(prefix)`` digits, is at least ``prefix``.

    Attributes:
        kept: how many that are.
        elements: out of how many.
    """

    prefix: tuple[int, ...]
    kept: int
    elements: int

    @property
    def keeps_all(self) -> bool:
        return self.kept >= self.elements

    @property
    def keeps_none(self) -> bool:
        return self.kept <= 0


class MagnitudeThreshold:
    """Observer that finds the threshold of the ``keep`` largest magnitudes among ``elements``.

    Works over one tensor's pieces or over all tensors of an expert; 512 KB whatever their size.

    Args:
        keep: how many to keep.
        elements: how many there are.
        key: the hash's key for a tensor, from its context.
    """

    def __init__(self, keep: int, elements: int, key: Callable[[Context], int]) -> None:
        self._keep = keep
        self._elements = elements
        self._key = key
        self._prefix: tuple[int, ...] = ()
        self._wanted = keep
        # numpy: torch would share even these few sums among threads, and wait for the slowest.
        self._counts = np.zeros(_BINS, dtype=np.int64)
        self._done = keep <= 0 or keep >= elements

    @property
    def done(self) -> bool:
        return self._done

    @property
    def prefix(self) -> tuple[int, ...]:
        """The digits of the threshold found so far."""
        return self._prefix

    def observe(self, values: Tensor, context: Context) -> None:
        flat = values.reshape(-1)
        self.add(context.kernels.histogram(flat, self._key(context), context.start, self._prefix))

    def add(self, counts: Tensor) -> None:
        """Take in counts of the next digit, int64 ``[65536]``."""
        self._counts += counts.numpy()

    def end_pass(self) -> None:
        """Fix one more digit: the bin that holds the last element to keep."""
        above = self._counts[::-1].cumsum()  # elements in this bin or a higher one
        position = int(above.searchsorted(self._wanted))
        digit = _BINS - 1 - position
        inside = int(self._counts[digit])
        self._wanted -= int(above[position]) - inside
        self._prefix += (digit,)
        self._counts.fill(0)
        only_zeros = self._prefix == (0, 0)  # whether a zero is kept makes no difference
        self._done = inside == self._wanted or only_zeros or len(self._prefix) == len(WIDTHS)

    def result(self) -> Threshold:
        return Threshold(self._prefix, self._keep, self._elements)


def histogram(delta: Tensor, key: int, start: int, prefix: tuple[int, ...]) -> Tensor:
    """Counts of digit number ``len(prefix)`` among the elements whose key begins with ``prefix``, int64 ``[65536]``."""
    bits = magnitude_bits(delta)
    if not prefix:
        digits = bits >> 15
    elif len(prefix) == 1:
        digits = bits[(bits >> 15) == prefix[0]] & 0x7FFF
    else:
        digits = _hash_digits(bits, key, start, prefix)
    return torch.bincount(digits, minlength=_BINS).cpu()


def keep(delta: Tensor, key: int, start: int, threshold: Threshold) -> Tensor:
    """``delta`` with everything below the threshold set to zero; what stays is unchanged."""
    if threshold.keeps_all:
        return delta
    if threshold.keeps_none:
        return torch.zeros_like(delta)
    bits, prefix = magnitude_bits(delta), threshold.prefix
    floor = (prefix[0] << 15) | (prefix[1] if len(prefix) > 1 else 0)
    kept = bits >= floor
    if len(prefix) > 2:
        tied = (bits == floor).nonzero().squeeze(1)
        kept[tied] = _hash_reaches(tied + start, key, prefix[2:])
    return torch.where(kept, delta, 0.0)


def magnitude_bits(delta: Tensor) -> Tensor:
    """The 31-bit pattern of each fp32 magnitude, int32: it orders magnitudes."""
    return delta.view(torch.int32) & _MAGNITUDE


def _hash_digits(bits: Tensor, key: int, start: int, prefix: tuple[int, ...]) -> Tensor:
    """The next digit of the hash among the elements with the threshold's magnitude and the hash digits so far."""
    tied = (bits == (prefix[0] << 15) | prefix[1]).nonzero().squeeze(1) + start
    digits = torch.empty_like(tied)
    for number, wanted in enumerate((*prefix[2:], None)):
        word = words_at(key, tied, plane=number // 2)
        digits = (word >> 16) if number % 2 == 0 else (word & 0xFFFF)
        if wanted is not None:
            tied = tied[digits == wanted]
    return digits


def _hash_reaches(elements: Tensor, key: int, digits: tuple[int, ...]) -> Tensor:
    """Whether each element's hash, cut to ``len(digits)`` digits, is at least ``digits``."""
    high = words_at(key, elements)
    if len(digits) == 1:
        return (high >> 16) >= digits[0]
    floor = (digits[0] << 16) | digits[1]
    if len(digits) == 2:
        return high >= floor
    low = words_at(key, elements, plane=1)
    if len(digits) == 3:
        reaches = (low >> 16) >= digits[2]
    else:
        reaches = low >= ((digits[2] << 16) | digits[3])
    return (high > floor) | ((high == floor) & reaches)
