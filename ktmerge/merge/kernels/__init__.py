"""Arithmetic that has, or may have, a fast form on some device, behind one narrow interface.

The plain torch reference is here too; every other implementation must equal it bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ktmerge.merge.kernels.rounding import Rounding
    from ktmerge.merge.kernels.search import Interval, Threshold


class Kernels(Protocol):
    """What stages and the engine may ask for. All tensors are flat; ``start`` is the first element's index."""

    def words(self, key: int, start: int, count: int, device: torch.device) -> Tensor:
        """Random 32-bit words of elements ``start .. start + count``, int64 ``[count]``."""

    def draws(self, key: int, start: int, count: int, device: torch.device) -> Tensor:
        """The same for comparing with one number, which the upper half of a draw mostly decides: element ``i`` has its
        upper half from half ``i % 2`` of word ``i // 2``, the lower half from that of the key with ``LOWER``."""

    def count(self, delta: Tensor, key: int, start: int, interval: Interval) -> Tensor:
        """Elements in each bin of the interval, and above it last: int64 ``[bins + 1]`` on the host."""

    def keep(self, delta: Tensor, key: int, start: int, threshold: Threshold) -> Tensor:
        """``delta`` with every element below the threshold set to zero."""

    def round(self, values: Tensor, dtype: torch.dtype, rounding: Rounding, key: int, start: int) -> Tensor:
        """``values`` rounded once to ``dtype``."""


def kernels_for(device: torch.device) -> Kernels:
    """The kernels to use on a device."""
    from ktmerge.merge.kernels.hybrid import Hybrid
    from ktmerge.merge.kernels.native import native
    from ktmerge.merge.kernels.reference import Reference

    compiled = native() if device.type == "cpu" else None
    return Reference() if compiled is None else Hybrid(compiled)
