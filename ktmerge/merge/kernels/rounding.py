"""From fp32 to the output's type, once: to the nearest value (ties to even), or stochastically without bias."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]


def round_to(values: Tensor, dtype: torch.dtype, rounding: Rounding, words: Tensor | None = None) -> Tensor:
    """``values`` in ``dtype``.

    Stochastic rounding goes to one of the two neighbours with probabilities that make its mean exact; a value that
    ``dtype`` can represent is unchanged, infinities and NaN pass, and a finite value never becomes infinite.

    Args:
        values: fp32 or fp64 ``[n]``.
        dtype: of the output.
        rounding: nearest or stochastic.
        words: random 32-bit words, int64 ``[n]``; needed for stochastic rounding to a narrower type.
    """
    if rounding == "nearest" or dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    if words is None:
        raise ValueError("stochastic rounding needs random words")
    values = values.to(torch.float32)
    return _to_bfloat16(values, words) if dtype == torch.bfloat16 else _to_float16(values, words)


def _to_bfloat16(values: Tensor, words: Tensor) -> Tensor:
    """Add 16 random bits below the cut, then cut: carries with probability (low bits) / 2**16, away from zero."""
    bits = values.view(torch.int32)
    carried = (bits.to(torch.int64) + (words >> 16)).to(torch.int32) & -0x10000
    rounded = carried.view(torch.float32)
    # Beside the largest finite value the carry would reach infinity; infinities and NaN must not move at all.
    rounded = torch.where(rounded.isfinite(), rounded, (bits & -0x10000).view(torch.float32))
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _to_float16(values: Tensor, words: Tensor) -> Tensor:
    """Choose between the two fp16 neighbours by how far the value is between them; fp16's subnormals included."""
    magnitude = values.abs()
    largest = torch.finfo(torch.float16).max
    below = magnitude.clamp(max=largest).to(torch.float16)
    below = torch.where(below.float() > magnitude, _step(below, -1), below)
    above = _step(below, 1).float()
    gap = above - below.float()
    share = (magnitude.double() - below.double()) / gap.double()
    up = (words.double() / 2.0**32 < share) & above.isfinite()
    rounded = torch.where(up, above, below.float()).copysign(values)
    return torch.where(values.isfinite(), rounded, values).to(torch.float16)


def _step(halves: Tensor, step: int) -> Tensor:
    """The next (or previous) non-negative fp16 value: patterns of one sign are ordered like the values."""
    return (halves.view(torch.int16) + step).view(torch.float16)
