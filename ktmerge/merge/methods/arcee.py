"""Arcee Fusion: keep the changes whose importance stands out in their tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Method, Parameters, Promises, Stages

if TYPE_CHECKING:
    from torch import Tensor


class ArceeFusionParameters(Parameters):
    k: float = Field(1.5, ge=0, description="how many interquartile ranges above the median an importance has to be")


@stage("arcee_fusion", "transform", ArceeFusionParameters, reach="tensor")
def arcee_fusion(delta: Tensor, parameters: ArceeFusionParameters, context: Context) -> Tensor:
    """Keep elements of importance |tau_j| ||tau_row|| >= median + k (third - first quartile), quartiles exact.

    A row is what goes into one output. Differs from mergekit (arcee_fusion), whose importance takes in the divergence
    of softmaxes of raw weights, which is rounding noise and negative for four in ten rows, and samples its quantiles.
    """
    import numpy as np
    import torch

    from ktmerge.merge.quantiles import RankedMagnitudes, quantile_rank
    from ktmerge.merge.rows import map_rows

    if not delta.numel():
        return delta
    importance = map_rows(delta, context, lambda rows: rows.abs() * rows.double().norm(dim=1, keepdim=True).float())
    quartiles = RankedMagnitudes([quantile_rank(share, delta.numel()) for share in (0.25, 0.5, 0.75)])
    while not quartiles.done:
        quartiles.add(importance)
        quartiles.end_pass()
    low, middle, high = quartiles.values
    limit = middle + parameters.k * (high - low)
    least = np.float32(limit)  # the least fp32 number that is not below it
    if least < limit:
        least = np.nextafter(least, np.float32(np.inf))
    return torch.where(importance >= float(least), delta, 0.0)


method(
    Method(
        name="arcee_fusion",
        summary="One expert: keep only changes that stand out; how many is decided by the tensor, not by a density.",
        source="Arcee Fusion of mergekit, with an importance that is no noise",
        stages=Stages(transform=(("arcee_fusion", {}),), combine=("sum", {})),
        experts=(1, 1),
        formula="tau where |tau_j| ||tau_row|| >= median + k interquartile ranges",
        promises=Promises(neutral=None, identical="other", elements=False),
    )
)
