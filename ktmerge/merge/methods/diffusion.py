"""Error-diffused rounding: what one weight loses to the output's type, those of later inputs make up for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ktmerge.merge.registry import stage
from ktmerge.merge.stage import Context, Need, Parameters, Tensor

if TYPE_CHECKING:
    import torch

    from ktmerge.merge.covariance import Covariance

_BLOCK = 64
"""Columns whose errors are passed on to later ones together."""


class DiffusionParameters(Parameters):
    damp: float = Field(0.01, ge=1e-9, le=1, description="added to the inputs' variances, relative to their mean")


@stage("diffuse", "scale", DiffusionParameters, reach="tensor", needs=lambda _: [Need("inputs", "base")], last=True)
def diffuse(merged: Tensor, parameters: DiffusionParameters, context: Context) -> Tensor:
    """Round theta_0 + M so that errors cancel on upstream inputs, as GPTQ does (arXiv:2210.17323), before it is stored.

    Inputs from first to last, H^-1 = R^T R of H = C_u + damp * mean variance: what rounding adds to W_j, over R_jj, is
    added times R_jk to every later W_k. A weight goes to one of its two neighbours in the type, as with stochastic
    rounding; one that is there stays, and so do those that M leaves at the base's or puts at an expert's own value.
    The type is the output's; of fp32 nothing is to be rounded. Comes last, at lambda 1, for instance
    ``scale: [{interpolate: {a: 0.5}}, diffuse]``.
    """
    import torch

    from ktmerge.checkpoints.dtypes import torch_dtype
    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.sampled import Sampled

    if context.output not in ("BF16", "F16"):
        return merged
    sampled, dtype = Sampled(context), torch_dtype(context.output)
    settled = merged == 0
    for delta in context.deltas:
        settled |= merged == delta.view_as(merged)

    def round_map(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        upstream = sampled.covariance("", number, base.shape[1])
        mean = upstream.trace() / max(base.shape[1], 1)
        if not mean > 0:
            return maps[0]
        own, fixed = maps[0], maps[1] > 0
        stored = diffused(base + own, fixed, upstream.ridged(parameters.damp * mean), dtype)
        return torch.where(fixed, own, (stored - base.double()).float())

    return by_map([merged, settled.float()], context, round_map, fused=False)


def diffused(values: Tensor, fixed: Tensor, inputs: Covariance, dtype: torch.dtype) -> Tensor:
    """A map's weights in ``dtype``, float64 ``[o, i]``.

    Args:
        values: fp32 ``[o, i]``.
        fixed: where they are rounded to the nearest, whatever other inputs lost.
        inputs: H, positive definite.
        dtype: bfloat16 or float16.
    """
    import torch

    from ktmerge.merge.compensation import factor_of

    low, high = neighbours(values, dtype)
    nearest = values.to(dtype).double()
    low, high = torch.where(fixed, nearest, low).T.contiguous(), torch.where(fixed, nearest, high).T.contiguous()
    wide = values.shape[1]
    blocks = [slice(start, min(start + _BLOCK, wide)) for start in range(0, wide, _BLOCK)]
    left, factor = values.double().T.contiguous(), factor_of(inputs, blocks)
    for part in blocks:
        factor.settle(left, part)
        own, within = left[part], factor.within(part)
        errors = torch.empty_like(own)
        for column in range(len(own)):
            wanted = own[column].clone()
            chosen = wanted.to(dtype).double().clamp(low[part][column], high[part][column])
            own[column] = chosen
            errors[column] = (chosen - wanted) / factor.pivots[part][column]
            own[column + 1 :].addr_(within[column, column + 1 :], errors[column])
        factor.hand_on(left, part, errors)
    return left.T


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of ``dtype`` that is not above, the least that is not below; float64, finite."""
    import torch

    size = values.abs().double()
    nearest = size.clamp(max=torch.finfo(dtype).max).to(dtype)
    bits = nearest.view(torch.int16)  # patterns of numbers of 0 or more are ordered as they are
    inner = torch.where(nearest.double() > size, bits - 1, bits).view(dtype).double()
    outer = torch.where(nearest.double() < size, bits + 1, bits).view(dtype).double()
    outer = torch.where(outer.isfinite(), outer, inner)
    below, above = torch.minimum(inner, outer), torch.maximum(inner, outer)
    return torch.where(values < 0, -above, below), torch.where(values < 0, -below, above)
