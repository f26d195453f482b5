"""Arcee Fusion: keep the changes whose importance stands out in their tensor."""

from __future__ import annotations

import math

from pydantic import Field

from ktmerge.merge.matrices import row_size
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Observer, Parameters, Promises, Stages, Statistic, Tensor


class ArceeFusionParameters(Parameters):
    k: Amount = Field(1.5, description="how many interquartile ranges above the median an importance has to be")


def _limit(parameters: ArceeFusionParameters) -> tuple[Statistic, ...]:
    """The root of the least importance that is kept, fp32."""

    def least(low: float, middle: float, high: float) -> float:
        import numpy as np

        limit = math.sqrt(middle**2 + parameters.k * (high**2 - low**2))
        found = np.float32(limit)  # the least fp32 number that is not below it
        return float(found if found >= limit else np.nextafter(found, np.float32(np.inf)))

    def start(elements: int) -> Observer:
        from ktmerge.merge.quantiles import Quantiles

        return Quantiles((0.25, 0.5, 0.75), elements, _importance, least)

    return (Statistic("limit", "tensor", start),)


@stage(
    "arcee_fusion", "transform", ArceeFusionParameters, statistics=_limit, portable=False,
    grain=lambda _, place: row_size(place),
)  # fmt: skip
def arcee_fusion(delta: Tensor, parameters: ArceeFusionParameters, context: Context) -> Tensor:
    """Keep elements of importance |tau_j| ||tau_row|| >= median + k (third - first quartile), quartiles exact.

    A row is what goes into one output. Differs from mergekit (arcee_fusion), whose importance takes in the divergence
    of softmaxes of raw weights, which is rounding noise and negative for one row in four, and samples its quantiles.
    """
    import torch

    return torch.where(_importance(delta, context) >= context.statistics["limit"], delta, 0.0)


def _importance(delta: Tensor, context: Context) -> Tensor:
    """Its root, of whole rows: as large as the changes, it leaves the range of fp32 neither up nor down."""
    from ktmerge.merge.rows import map_rows

    def root(rows: Tensor) -> Tensor:
        exact = rows.double()
        size: Tensor = exact.norm(dim=1, keepdim=True)
        return (exact.abs() * size).sqrt().float()

    return map_rows(delta, context, root)


method(
    name="arcee_fusion",
    summary="One expert: keep only changes that stand out; how many is decided by the tensor, not by a density.",
    source="Arcee Fusion of mergekit, with an importance that is no noise",
    stages=Stages(transform=(("arcee_fusion", {}),), combine=("sum", {})),
    experts=(1, 1),
    formula="tau where |tau_j| ||tau_row|| >= median + k interquartile ranges",
    promises=Promises(neutral=None, identical="other", elements=False),
    semantics=2,
)
