"""Exact quantiles of magnitudes, streaming, in fixed memory, whatever the order and size of the pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktmerge.merge.kernels.native import Native, native
from ktmerge.merge.kernels.radix import magnitude_bits
from ktmerge.merge.ranking import LOW_BITS, quantile_rank
from ktmerge.merge.stage import Context

_BLOCK = 1 << 21
"""Elements worked on at once."""


class RankedMagnitudes:
    """The fp32 magnitudes of given ranks: two passes, of the upper and the lower half of their bit patterns.

    Args:
        ranks: from the smallest, from 0.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = list(ranks)
        self._bins: list[int] = []
        self._upper = np.zeros(1 << (31 - LOW_BITS), np.int64)
        self._lower = np.zeros((len(ranks), 1 << LOW_BITS), np.int64)
        self.values: list[float] = []
        self.done = False

    def add(self, values: Tensor) -> None:
        """Take in one piece."""
        compiled = native() if values.device.type == "cpu" and values.numel() else None
        if compiled is not None:
            self._add_compiled(compiled, values.reshape(-1))
            return
        for piece in torch.split(values.reshape(-1), _BLOCK):
            bits = magnitude_bits(piece)
            if not self._bins:
                self._upper += torch.bincount(bits >> LOW_BITS, minlength=self._upper.size).cpu().numpy()
                continue
            for counts, upper in zip(self._lower, self._bins, strict=True):
                inside = bits[(bits >> LOW_BITS) == upper] & ((1 << LOW_BITS) - 1)
                counts += torch.bincount(inside, minlength=counts.size).cpu().numpy()

    def _add_compiled(self, kernels: Native, values: Tensor) -> None:
        intervals = [(upper << LOW_BITS, 0, counts) for upper, counts in zip(self._bins, self._lower, strict=False)]
        for low, shift, counts in intervals or [(0, LOW_BITS, self._upper)]:
            found = np.zeros(counts.size + 1, np.int64)
            kernels.tally(
                values.data_ptr(), values.numel(), low, (counts.size << shift) - 1, shift, counts.size,
                found.ctypes.data,
            )  # fmt: skip
            counts += found[:-1]

    def end_pass(self) -> None:
        """All pieces have been shown once."""
        if not self._bins:
            self._bins = [_bin_of(self._upper, rank) for rank in self._ranks]
            return
        for counts, upper, rank in zip(self._lower, self._bins, self._ranks, strict=True):
            low = _bin_of(counts, rank - int(self._upper[:upper].sum()))
            self.values.append(float(np.uint32((upper << LOW_BITS) + low).view(np.float32)))
        self.done = True


class Quantiles(RankedMagnitudes):
    """Observer of quantiles of the magnitudes of what is made of each piece.

    Args:
        shares: of the elements, one for each quantile.
        elements: of all pieces together.
        ranked: from what the stage is given, and the context, to what is ranked.
        result: from the quantiles to what the stage finds.
    """

    def __init__(
        self,
        shares: Sequence[float],
        elements: int,
        ranked: Callable[[Any, Context], Tensor],
        result: Callable[..., float] = float,
    ) -> None:
        super().__init__([quantile_rank(share, elements) for share in shares])
        self._ranked, self._result = ranked, result

    def observe(self, values: Any, context: Context) -> None:
        self.add(self._ranked(values, context))

    def result(self) -> float:
        return self._result(*self.values)


def _bin_of(counts: np.ndarray, rank: int) -> int:
    """The bin that holds the element of a rank; the first of none at all."""
    return int(counts.cumsum().searchsorted(rank, side="right")) if counts.any() else 0
