"""Caps on a change: on its norm, on its singular values, on its elements."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ktmerge.merge.program import Cap, Clamp
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Observer, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.summed import Summed


class ClipParameters(Parameters):
    cap: Literal["norm", "spectral", "quantile"] = Field(
        "norm", description="what is capped: the change's norm, its singular values, or its elements' magnitudes"
    )
    rho: Amount = Field(0.05, description="cap norm and spectral: as a share of the base's norm, or largest value")
    quantile: float = Field(0.99, ge=0, le=1, description="cap quantile: of the tensor's magnitudes, the cap on all")
    split_fused: bool = Field(True, description="cap spectral: take maps that share a tensor apart")


class NearswapParameters(Parameters):
    t: Amount = Field(1e-3, description="the largest magnitude a change may have, in units of the weights")


def _statistics(parameters: ClipParameters) -> tuple[Statistic, ...]:
    def start(elements: int) -> Observer:
        if parameters.cap != "quantile":
            cap = Cap(parameters.rho)
            return Summed(2, lambda merged, context: [context.base, merged], lambda _, *own: cap.limit(*own), math.inf)
        from ktmerge.merge.quantiles import Quantiles

        return Quantiles((parameters.quantile,), elements, lambda values, _: values)

    return (Statistic("limit", "tensor", start),)


@stage(
    "clip", "guard", ClipParameters, statistics=_statistics, whole=lambda given: given.cap == "spectral",
    compiled=lambda given: Cap(given.rho) if given.cap == "norm" else None,
)  # fmt: skip
def clip(merged: Tensor, deltas: list[Tensor], parameters: ClipParameters, context: Context) -> Tensor:
    """Let no tensor change by more than a cap.

    ``norm``: M min(1, rho ||theta_0|| / ||M||). ``spectral``: singular values min(s_k, rho s_1(theta_0)) of every map;
    other tensors by norm. ``quantile``: elements to [-c, c], c the least magnitude that so large a share of the
    tensor does not exceed. A tensor that is 0 in the base stays 0 under a cap of norm or spectrum: rho = 0 is the base.
    """
    import torch

    if parameters.cap == "quantile":
        if parameters.quantile == 0:
            return torch.zeros_like(merged)
        limit = context.statistics["limit"]
        return merged.clamp(-limit, limit)
    if parameters.cap == "spectral" and context.tensor_class == "matrix" and merged.dim() > 1 and merged.numel():
        return _capped_maps(merged, parameters, context)
    factor = min(1.0, context.statistics["limit"])
    return merged if factor == 1 else merged * factor


def _capped_maps(merged: Tensor, parameters: ClipParameters, context: Context) -> Tensor:
    from ktmerge.merge.matrices import by_map, changed
    from ktmerge.merge.spectra import one_sided

    def shrink(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        import torch

        own = maps[0]
        if not changed(maps, base):
            return own
        limit = parameters.rho * float(one_sided(base).values[0])
        if limit == 0:
            return torch.zeros_like(own)
        found = one_sided(own)
        if float(found.values[0]) <= limit:
            return own
        return found.filtered(limit / found.values.clamp(min=limit)).float()

    return by_map([merged], context, shrink, fused=parameters.split_fused)


@stage("nearswap", "guard", NearswapParameters, compiled=lambda given: Clamp(given.t))
def nearswap(merged: Tensor, deltas: list[Tensor], parameters: NearswapParameters, context: Context) -> Tensor:
    """Clip every element of the change to [-t, t]: small changes stay whole, large ones are capped.

    Differs from mergekit in the words only: theta_0 + clip(t / |tau|, 0, 1) tau is this clip, for t of 1e-6 or more,
    the least that it divides by.
    """
    return merged.clamp(-parameters.t, parameters.t)


method(
    name="clip",
    summary="One expert or an average: cap the change of every tensor relative to the base; a safe first guard.",
    source="ktmerge; projection onto a ball around the base, as in trust regions",
    stages=Stages(combine=("mean", {}), guard=(("clip", {}),)),
    formula="M min(1, rho ||theta_0|| / ||M||), or its singular values or elements capped",
    cost="N oi; spectral: svd oi min(o, i)",
    promises=Promises(neutral={"rho": 1e9}, nothing={"rho": 0.0}, identical="other", scale=False),
)
method(
    name="nearswap",
    summary="One expert: take small changes whole and cap large ones, which break what the base knew.",
    source="mergekit's nearswap; Alchemonaut",
    stages=Stages(combine=("mean", {}), guard=(("nearswap", {}),)),
    formula="clip(M, -t, t)",
    promises=Promises(neutral={"t": 1e9}, nothing={"t": 0.0}, identical="mean", scale=False),
)
