"""Inner products of deltas, of sums of whole numbers: norms and angles that are the same on every device.

Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF = 17
"""Bits of half an integer: products of halves add up exactly, 2**20 of them in fp64 and 2**30 in int64."""
_FROZEN = 1e-12


@dataclass(frozen=True)
class Geometry:
    """Inner products of N deltas in each of G groups of elements.

    Attributes:
        products: ``[G, N, N]`` fp64, <tau_a, tau_b>.
        base: ``[G]`` fp64, ||theta_0||^2.
    """

    products: NDArray[Any]
    base: NDArray[Any]

    @cached_property
    def norms(self) -> NDArray[Any]:
        """``[G, N]``: ||tau_t||; exactly 0 for experts that did not move, that is up to 1e-12 ||theta_0||."""
        norms = np.sqrt(np.diagonal(self.products, axis1=1, axis2=2))
        return np.asarray(np.where(norms > _FROZEN * np.sqrt(self.base)[:, None], norms, 0.0))

    @cached_property
    def cosines(self) -> NDArray[Any]:
        """``[G, N, N]``; 0 for experts that did not move."""
        lengths = self.norms[:, :, None] * self.norms[:, None, :]
        return np.asarray(
            np.clip(np.divide(self.products, lengths, out=np.zeros_like(lengths), where=lengths > 0), -1.0, 1.0)
        )


def units(exponents: NDArray[Any]) -> NDArray[Any]:
    """What makes whole numbers of 34 bits of values below ``2**exponents``."""
    return np.asarray(np.ldexp(1.0, 2 * HALF - 1 - exponents))


def geometry_of(sums: NDArray[Any], exponents: NDArray[Any]) -> Geometry:
    """From sums of products of halves.

    Args:
        sums: int64 ``[G, 2 (N + 1), 2 (N + 1)]``: the upper halves of the N deltas and of the base, then the lower.
        exponents: ``[G, N + 1]``: of powers of two above the largest magnitudes.
    """
    count = exponents.shape[1]
    halves = sums.astype(np.float64)
    high, low = slice(None, count), slice(count, None)
    mixed = halves[:, high, low] + halves[:, low, high]
    total = np.ldexp(halves[:, high, high], 2 * HALF) + np.ldexp(mixed, HALF) + halves[:, low, low]
    powers = exponents - (2 * HALF - 1)
    products = np.ldexp(total, powers[:, :, None] + powers[:, None, :])
    return Geometry(products[:, :-1, :-1], products[:, -1, -1])
