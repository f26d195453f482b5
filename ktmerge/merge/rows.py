"""Ranks of magnitudes within the rows of a tensor, equal ones decided by a hash of their position."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ktmerge.merge.kernels.codes import DIGIT, DIGITS
from ktmerge.merge.kernels.native import native
from ktmerge.merge.kernels.radix import magnitude_bits
from ktmerge.merge.kernels.splitmix import hashes
from ktmerge.merge.matrices import join_rows, row_views

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.kernels.native import Native
    from ktmerge.merge.stage import Context

_DIGITS = (DIGITS, 1 << DIGIT)
_BLOCK = 1 << 21
"""Elements worked on at once."""

Choose = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


def by_row(delta: Tensor, context: Context, key: int, choose: Choose) -> Tensor:
    """Put ``choose(rows [r, i], ranks [r, i], elements [r, i])`` in place of some rows at a time.

    Args:
        delta: whole rows of a tensor, of any shape.
        context: of the stage.
        key: of the hashes that decide between equal magnitudes.
        choose: gives new rows, by ranks (0 the smallest magnitude) and indices into the flattened tensor.
    """
    place = context.place
    elements = torch.arange(context.start, context.start + delta.numel(), device=delta.device)
    pairs = zip(row_views(delta, place), row_views(elements, place), strict=True)
    return join_rows([_in_blocks(values, where, key, choose) for values, where in pairs], delta, place)


def map_rows(delta: Tensor, context: Context, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Put ``change(rows [r, i])`` in place of some rows at a time."""
    views = row_views(delta, context.place)
    changed = [torch.cat([change(rows[block]) for block in _blocks(rows)]) for rows in views]
    return join_rows(changed, delta, context.place)


def pieces(values: Tensor) -> list[Tensor]:
    """The flattened tensor, some elements at a time: what is computed in float64 need not be held as a whole."""
    flat = values.reshape(-1)
    return [flat[start : start + _BLOCK] for start in range(0, flat.numel(), _BLOCK)]


def ranks_of(rows: Tensor, elements: Tensor, key: int) -> Tensor:
    """Rank of each magnitude in its row, 0 the smallest, int64 like ``rows``; equals by the upper half of the hash."""
    compiled = native() if rows.device.type == "cpu" and rows.numel() else None
    if compiled is not None:
        return _compiled_ranks(compiled, rows, elements, key)
    bits = magnitude_bits(rows.contiguous()).to(torch.int64)
    order = ((bits << 32) | ((hashes(key, elements) >> 32) & 0xFFFFFFFF)).argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _compiled_ranks(kernels: Native, rows: Tensor, elements: Tensor, key: int) -> Tensor:
    values, indices = rows.contiguous(), elements.contiguous()
    count, wide = rows.shape
    ranks = torch.empty((count, wide), dtype=torch.int64)
    keys, orders, counts = np.empty(wide, np.uint64), np.empty((2, wide), np.uint32), np.empty(_DIGITS, np.uint32)
    kernels.rank(
        values.data_ptr(), indices.data_ptr(), key, count, wide, ranks.data_ptr(),
        keys.ctypes.data, orders.ctypes.data, counts.ctypes.data,
    )  # fmt: skip
    return ranks


def _in_blocks(rows: Tensor, elements: Tensor, key: int, choose: Choose) -> Tensor:
    blocks = _blocks(rows)
    return torch.cat([choose(rows[b], ranks_of(rows[b], elements[b], key), elements[b]) for b in blocks])


def _blocks(rows: Tensor) -> list[slice]:
    count = max(1, _BLOCK // rows.shape[1])
    return [slice(start, start + count) for start in range(0, rows.shape[0], count)]
