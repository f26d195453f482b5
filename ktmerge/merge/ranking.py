"""Which elements are the largest, exactly so many, whatever ties; which is a quantile. Importing it loads no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOW_BITS = 16
"""Bits in the lower half of a magnitude's pattern: exact quantiles take one pass for each half."""


def quantile_rank(share: float, elements: int) -> int:
    """Rank, from the smallest and from 0, of the least value that ``share`` of the elements do not exceed."""
    return max(0, math.ceil(round(share * elements, 6)) - 1)


def largest(scores: Tensor, count: int, key: int) -> Tensor:
    """Mask, shaped like ``scores``, of exactly ``count`` of the largest; ties go to the larger hash of the index.

    Args:
        scores: any shape, finite.
        count: from 0 to their number.
        key: of the hash; see `ktmerge.merge.kernels.keys`.
    """
    import torch

    from ktmerge.merge.kernels.splitmix import hashes

    flat = scores.reshape(-1)
    total = flat.numel()
    if count <= 0 or count >= total:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    edge = flat.kthvalue(total - count + 1).values
    kept = flat > edge
    tied = (flat == edge).nonzero().squeeze(1)
    unsigned = hashes(key, tied) ^ torch.iinfo(torch.int64).min  # signed order of these is the hashes' own
    kept[tied[unsigned.topk(count - int(kept.sum())).indices]] = True
    return kept.reshape(scores.shape)


def largest_of_rows(scores: Tensor, count: int, key: int) -> Tensor:
    """Mask ``[o, i]`` of the ``count`` largest of each row, ties as in `largest` with the key ``key + number``.

    Args:
        scores: ``[o, i]``, finite.
        count: from 0 to i.
        key: of the hash.
    """
    import torch

    wide = scores.shape[1]
    if count <= 0 or count >= wide or not scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    kept = scores >= scores.kthvalue(wide - count + 1, dim=1, keepdim=True).values
    for number in (kept.sum(1) > count).nonzero().squeeze(1).tolist():
        kept[number] = largest(scores[number], count, key + number)
    return kept
