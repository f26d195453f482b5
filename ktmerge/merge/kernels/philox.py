"""Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") in torch integer arithmetic.

The same bits on every device, for any chunking: element ``i`` owns lane ``i % 4`` of the block with counter ``i // 4``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_BLOCK = 1 << 16
"""Counters per step: the working set stays in the processor's cache."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for every counter.

    Args:
        counter: its four 32-bit words, low first, each int64 ``[n]``.
        key: 64 bits.

    Returns:
        int64 ``[n]`` each, in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so masking the shifted bits gives the exact high half.
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = ((p1 >> 32) & _MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = ((p0 >> 32) & _MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def words(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random word of the elements ``start .. start + count``, int64 ``[count]``, in ``[0, 2**32)``."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    first, last = start // 4, (start + count - 1) // 4 + 1
    result = torch.empty((last - first) * 4, dtype=torch.int64, device=device)
    for begin in range(first, last, _BLOCK):
        end = min(begin + _BLOCK, last)
        index = torch.arange(begin, end, dtype=torch.int64, device=device)
        lanes = result[(begin - first) * 4 : (end - first) * 4].view(-1, 4)
        for lane, word in enumerate(philox(_counter(index), key)):
            lanes[:, lane] = word
    return result[start - first * 4 :][:count]


def _counter(block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(block)
    return block & _MASK, block >> 32, zero, zero
