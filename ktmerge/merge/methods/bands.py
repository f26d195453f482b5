"""Bands of magnitude, each with a coefficient of its own."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from ktmerge.merge.methods.trim import hash_key
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Observer, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.recipes.schema import Factor


class BandsParameters(Parameters):
    coefficients: list[Factor] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        min_length=1,
        description="of equally many elements each, from the smallest magnitudes to the largest; to be searched for",
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="rank within each tensor, or among all elements of the expert"
    )


def _edges(parameters: BandsParameters) -> tuple[Statistic, ...]:
    count = len(parameters.coefficients)

    def start(band: int, elements: int) -> Observer:
        from ktmerge.merge.kernels.radix import MagnitudeThreshold

        return MagnitudeThreshold(elements - band * elements // count, elements, hash_key)

    return tuple(Statistic(str(band), parameters.scope, partial(start, band)) for band in range(1, count))


@stage("bands", "transform", BandsParameters, statistics=_edges)
def bands(delta: Tensor, parameters: BandsParameters, context: Context) -> Tensor:
    """Multiply the elements of the m-th of M bands of magnitude by c_m (after neural parameter search, ACL 2025).

    Band m holds the ranks floor(m n / M) to floor((m+1) n / M) - 1 of |tau|, from the smallest; equal magnitudes are
    decided as in trim. All coefficients 1 change nothing.
    """
    import torch

    key = hash_key(context)
    factors = torch.full_like(delta, parameters.coefficients[0])
    for band, coefficient in enumerate(parameters.coefficients[1:], 1):
        above = context.kernels.keep(delta, key, context.start, context.statistics[str(band)])
        factors = torch.where(above != 0, coefficient, factors)
    return delta * factors


method(
    name="bands",
    summary="One expert and a validation score: one coefficient for each band of magnitude, to search.",
    source="Neural parameter search, ACL 2025; the bands by exact quantiles",
    stages=Stages(transform=(("bands", {}),), combine=("sum", {})),
    otherwise={"vector": Stages(combine=("sum", {}))},
    formula="c_m tau_j, m the band of quantiles of |tau| that |tau_j| is in",
    cost="N M oi",
    promises=Promises(neutral={"coefficients": [1.0, 1.0]}, identical="sum"),
    semantics=2,
)
