"""The kernels on a CPU that has the compiled ones: these where there is one, else plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ktmerge.merge.kernels.codes import BLOCK
from ktmerge.merge.kernels.native import Native
from ktmerge.merge.kernels.reference import Reference
from ktmerge.merge.kernels.search import Interval, Threshold


class Hybrid(Reference):
    """See `ktmerge.merge.kernels.Kernels`; several threads may use it at once."""

    def __init__(self, native: Native) -> None:
        self._native = native

    def words(self, key: int, start: int, count: int, device: torch.device) -> Tensor:
        out, scratch = torch.empty(count, dtype=torch.int64), np.empty(BLOCK, np.uint32)
        self._native.words(key, start, count, out.data_ptr(), scratch.ctypes.data)
        return out

    def count(self, delta: Tensor, key: int, start: int, interval: Interval) -> Tensor:
        values, counts = delta.contiguous(), torch.zeros(interval.bins + 1, dtype=torch.int64)
        where = (interval.low, interval.last, interval.shift, interval.bins, counts.data_ptr())
        if interval.hashed:
            self._native.tally_hashes(values.data_ptr(), values.numel(), start, interval.floor, key, *where)
        else:
            self._native.tally(values.data_ptr(), values.numel(), *where)
        return counts

    def keep(self, delta: Tensor, key: int, start: int, threshold: Threshold) -> Tensor:
        if threshold.keeps_all or threshold.keeps_none or not delta.numel():
            return super().keep(delta, key, start, threshold)
        values, out = delta.contiguous(), torch.empty_like(delta)
        self._native.select(
            values.data_ptr(), values.numel(), start, threshold.floor, threshold.least, key, out.data_ptr()
        )  # fmt: skip
        return out
