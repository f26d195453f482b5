"""Ranks of magnitudes within the rows of a tensor, equal ones decided by a hash of their position."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ktmerge.merge.kernels.radix import magnitude_bits
from ktmerge.merge.kernels.splitmix import hashes
from ktmerge.merge.matrices import join, split

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.stage import Context

_BLOCK = 1 << 22
"""Elements ranked at once."""

Choose = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


def by_row(delta: Tensor, context: Context, key: int, choose: Choose) -> Tensor:
    """Put ``choose(rows [r, i], ranks [r, i], elements [r, i])`` in place of some rows at a time.

    A row is what goes into one output of a linear map or convolution (whichever way it is stored), an entry of an
    embedding, or a whole vector.

    Args:
        delta: the whole tensor, shaped.
        context: of the stage.
        key: of the hashes that decide between equal magnitudes.
        choose: gives new rows, by ranks (0 the smallest magnitude) and indices into the flattened tensor.
    """
    if not delta.numel():
        return delta
    elements = torch.arange(delta.numel(), device=delta.device).view(delta.shape)
    if context.tensor_class == "matrix" and delta.dim() > 1:
        maps = zip(split(delta, context, fused=False), split(elements, context, fused=False), strict=True)
        return join([_in_blocks(values, where, key, choose) for values, where in maps], context, fused=False)
    wide = delta.numel() if delta.dim() < 2 else delta.shape[-1]
    if context.tensor_class == "conv":
        wide = delta.numel() // delta.shape[0]
    return _in_blocks(delta.reshape(-1, wide), elements.view(-1, wide), key, choose).view(delta.shape)


def ranks_of(rows: Tensor, elements: Tensor, key: int) -> Tensor:
    """Rank of each magnitude in its row, 0 the smallest, int64 like ``rows``."""
    bits = magnitude_bits(rows.contiguous()).to(torch.int64)
    order = ((bits << 32) | ((hashes(key, elements) >> 32) & 0xFFFFFFFF)).argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _in_blocks(rows: Tensor, elements: Tensor, key: int, choose: Choose) -> Tensor:
    count = max(1, _BLOCK // rows.shape[1])
    blocks = (slice(start, start + count) for start in range(0, rows.shape[0], count))
    return torch.cat([choose(rows[b], ranks_of(rows[b], elements[b], key), elements[b]) for b in blocks])
