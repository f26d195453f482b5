"""Changes within a stated error: rounded to steps, or as a product of two thin matrices of integers.

Decoding gives the same bits on every machine: products are of integers and so exact in float64 whatever their order,
the rest is one operation an element.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.deltas.coding import from_planes, packed, planes, unpacked

if TYPE_CHECKING:
    from torch import Tensor

MOST_RANK = 64
"""A change of a higher rank than this is not worth the search for its factors."""
_FACTOR = 32767
_LARGEST_STEP = 2**31 - 1


def quantise(delta: Tensor, error: float) -> tuple[dict[str, Any], list[bytes], Tensor]:
    """``delta`` in equal steps.

    Args:
        delta: fp32, any shape.
        error: wanted norm of the difference, relative to that of ``delta``.

    Returns:
        parameters, blobs, and what they decode to, fp32.
    """
    import torch

    rms = float(delta.double().pow(2).mean().sqrt())
    step = float(np.float32(error * rms * math.sqrt(12)))  # the error of rounding to steps s is s / sqrt(12)
    if not step > 0 or not math.isfinite(step):
        return {"coding": "quantised", "step": 0.0, "width": 1}, [], torch.zeros_like(delta)
    counts = (delta.double() / step).round().clamp(-_LARGEST_STEP, _LARGEST_STEP).to(torch.int64).reshape(-1).numpy()
    folded = ((counts << 1) ^ (counts >> 63)).astype(np.uint64)
    width = next(w for w in (1, 2, 4, 8) if w == 8 or int(folded.max(initial=0)) < 1 << (8 * w))
    blob = packed(planes(folded.astype(f"u{width}")))
    parameters = {"coding": "quantised", "step": step, "width": width}
    return parameters, [blob], dequantise(parameters, [blob], delta.numel()).reshape(delta.shape)


def dequantise(parameters: dict[str, Any], blobs: list[bytes], count: int) -> Tensor:
    """What `quantise` says its blobs decode to, fp32 ``[count]``.

    Raises:
        ValueError: the blobs are not what it gave.
    """
    import torch

    step, width = float(parameters["step"]), int(parameters["width"])
    if step == 0:
        return torch.zeros(count)
    folded = from_planes(unpacked(blobs[0], count * width), np.dtype(f"u{width}")).astype(np.uint64)
    counts = (folded >> np.uint64(1)).astype(np.int64) ^ -(folded & np.uint64(1)).astype(np.int64)
    return torch.from_numpy((counts.astype(np.float64) * step).astype(np.float32))


def factorise(delta: Tensor, error: float) -> tuple[dict[str, Any], list[bytes], Tensor] | None:
    """``delta`` ``[o, i]`` as a product of integers ``[o, r] [r, i]`` times a step; None if no small r comes near."""
    import torch

    o, i = delta.shape
    most = min(MOST_RANK, o // 4, i // 4)
    if most < 1:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(delta, q=most, niter=2)
    whole = float(delta.double().pow(2).sum())
    left_over = whole - values.double().pow(2).cumsum(0)
    near = (left_over <= (0.9 * error) ** 2 * whole).nonzero()
    if not len(near):
        return None
    rank = int(near[0]) + 1
    root = values[:rank].sqrt()
    parameters: dict[str, Any] = {"coding": "low-rank", "rank": rank, "shape": [o, i], "steps": []}
    blobs = []
    for factor in (left[:, :rank] * root, right[:, :rank] * root):
        step = float(np.float32(factor.abs().max().item() / _FACTOR))
        counts = (factor.double() / step).round().clamp(-_FACTOR, _FACTOR).to(torch.int16).numpy()
        parameters["steps"].append(step)
        blobs.append(packed(planes(counts.reshape(-1).view(np.uint16))))
    return parameters, blobs, multiply(parameters, blobs)


def multiply(parameters: dict[str, Any], blobs: list[bytes]) -> Tensor:
    """What `factorise` says its blobs decode to, fp32 ``[o, i]``.

    Raises:
        ValueError: the blobs are not what it gave.
    """
    import torch

    rank, shape = int(parameters["rank"]), [int(size) for size in parameters["shape"]]
    if rank > MOST_RANK:
        raise ValueError(f"factors of rank {rank}")
    left, right = (
        from_planes(unpacked(blob, size * rank * 2), np.dtype(np.uint16)).view(np.int16).reshape(size, rank)
        for blob, size in zip(blobs, shape, strict=True)
    )
    exact = left.astype(np.float64) @ right.astype(np.float64).T  # sums of r products below 2^30: exact in any order
    steps = [float(step) for step in parameters["steps"]]
    return torch.from_numpy((exact * (steps[0] * steps[1])).astype(np.float32))
