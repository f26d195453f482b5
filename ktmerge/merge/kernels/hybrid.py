"""The kernels on a CPU that has the compiled ones: these where there is one, else plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ktmerge.merge.kernels.codes import BLOCK
from ktmerge.merge.kernels.native import Native
from ktmerge.merge.kernels.reference import Reference


class Hybrid(Reference):
    """See `ktmerge.merge.kernels.Kernels`; several threads may use it at once."""

    def __init__(self, native: Native) -> None:
        self._native = native

    def words(self, key: int, start: int, count: int, device: torch.device) -> Tensor:
        out, scratch = torch.empty(count, dtype=torch.int64), np.empty((2, BLOCK), np.uint32)
        self._native.words(key, start, count, out.data_ptr(), scratch.ctypes.data)
        return out
