"""Sums over experts that give the same bits on every device and for any piece of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


VECTORS = 64
"""Elements that exponentials are taken of together: torch computes what is left over of a vector in another way, which
must not depend on where a piece ends."""


def quotient(values: Tensor, divisor: float) -> Tensor:
    """``values / divisor``, rounded once: on a GPU torch would multiply by the reciprocal of a plain number."""
    return values / values.new_full((), divisor)


def weighted_total(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_t w_t x_t``, left to right, every product and sum rounded by itself.

    A fused multiply-add (``torch.add`` with alpha) would round differently in the vectorised body of a loop and in its
    tail, so that the result would depend on where a piece ends.
    """
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor if weight == 1 else tensor * weight
    return total
