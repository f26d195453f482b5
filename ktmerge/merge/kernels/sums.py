"""Sums of magnitudes and of squares without rounding: equal whatever the order, the pieces and the device."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ktmerge.merge.kernels.exact import HALF, exact_value
from ktmerge.merge.kernels.native import Native, native

_EXPONENTS = 256
_HALF = 12
"""Bits in the low half of a 24-bit mantissa."""


class ExactSum:
    """Exact sum of ``|x| ** power`` of finite fp32 values, ``power`` 1 or 2.

    Values of one exponent are integers times one power of two, and integers add exactly in fp64 below 2**53.
    """

    def __init__(self, power: int) -> None:
        self._power = power
        self._bins = [0] * _EXPONENTS

    def add(self, values: Tensor) -> None:
        """Take in up to 2**27 values of any shape."""
        compiled = native() if values.device.type == "cpu" and values.numel() else None
        if compiled is not None:
            self._add_compiled(compiled, values.reshape(-1))
            return
        bits = values.reshape(-1).view(torch.int32)
        exponent = (bits >> 23) & 0xFF
        mantissa = (bits & 0x7FFFFF) | torch.where(exponent > 0, 1 << 23, 0)
        exponent = exponent.clamp(min=1)  # subnormals share the exponent of the smallest normal numbers
        if self._power == 1:
            self._take(exponent, mantissa, 0)
        else:  # (h 2**12 + l)**2, each product below 2**25
            high, low = mantissa >> _HALF, mantissa & ((1 << _HALF) - 1)
            self._take(exponent, high * high, 2 * _HALF)
            self._take(exponent, high * low, _HALF + 1)
            self._take(exponent, low * low, 0)

    def value(self) -> Fraction:
        """The sum so far."""
        return exact_value(self._bins, self._power)

    def _add_compiled(self, kernels: Native, values: Tensor) -> None:
        bins = np.zeros((2, _EXPONENTS), np.uint64)
        kernels.add_up(values.data_ptr(), values.numel(), self._power, bins.ctypes.data)
        for index in np.flatnonzero(bins.any(axis=0)).tolist():
            self._bins[index] += (int(bins[0, index]) << HALF) + int(bins[1, index])

    def _take(self, exponent: Tensor, amount: Tensor, shift: int) -> None:
        sums = torch.bincount(exponent, weights=amount.double(), minlength=_EXPONENTS)
        for index, total in enumerate(sums.tolist()):
            if total:
                self._bins[index] += int(total) << shift
