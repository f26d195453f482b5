"""The kernels in plain torch: what every other implementation is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from ktmerge.merge.kernels import philox, radix
from ktmerge.merge.kernels.keys import LOWER
from ktmerge.merge.kernels.rounding import Rounding, round_to
from ktmerge.merge.kernels.search import Interval, Threshold

_EXACT = (torch.float32, torch.float64)


class Reference:
    """See `ktmerge.merge.kernels.Kernels`."""

    def words(self, key: int, start: int, count: int, device: torch.device) -> Tensor:
        return philox.words(key, start, count, device)

    def draws(self, key: int, start: int, count: int, device: torch.device) -> Tensor:
        first, last = start // 2, (start + count + 1) // 2
        words = (self.words(one, first, last - first, device) for one in (key, key ^ LOWER))
        upper, lower = (torch.stack((word & 0xFFFF, word >> 16), 1).view(-1) for word in words)
        return (upper << 16 | lower)[start % 2 :][:count]

    def count(self, delta: Tensor, key: int, start: int, interval: Interval) -> Tensor:
        return radix.count(delta, key, start, interval)

    def keep(self, delta: Tensor, key: int, start: int, threshold: Threshold) -> Tensor:
        return radix.keep(delta, key, start, threshold)

    def round(self, values: Tensor, dtype: torch.dtype, rounding: Rounding, key: int, start: int) -> Tensor:
        if rounding == "nearest" or dtype in _EXACT:
            return round_to(values, dtype, "nearest")
        return round_to(values, dtype, rounding, philox.words(key, start, values.numel(), values.device))
