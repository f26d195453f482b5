"""Arcee Fusion: keep the changes whose importance stands out in their tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ktmerge.merge.matrices import row_size
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Domain, Method, Observer, Parameters, Place, Promises, Stages, Statistic

if TYPE_CHECKING:
    from torch import Tensor


class ArceeFusionParameters(Parameters):
    k: float = Field(1.5, ge=0, description="how many interquartile ranges above the median an importance has to be")


class _Limit:
    """Observer of the least importance that is kept, fp32, from exact quartiles."""

    def __init__(self, k: float, elements: int) -> None:
        from ktmerge.merge.quantiles import RankedMagnitudes
        from ktmerge.merge.ranks import quantile_rank

        self._k = k
        self._quartiles = RankedMagnitudes([quantile_rank(share, elements) for share in (0.25, 0.5, 0.75)])

    @property
    def done(self) -> bool:
        return self._quartiles.done

    def observe(self, values: Tensor, context: Context) -> None:
        self._quartiles.add(_importance(values, context))

    def end_pass(self) -> None:
        self._quartiles.end_pass()

    def result(self) -> float:
        import numpy as np

        low, middle, high = self._quartiles.values
        limit = middle + self._k * (high - low)
        least = np.float32(limit)  # the least fp32 number that is not below it
        return float(least if least >= limit else np.nextafter(least, np.float32(np.inf)))


def _limit(parameters: ArceeFusionParameters) -> tuple[Statistic, ...]:
    def start(domain: Domain) -> Observer:
        return _Limit(parameters.k, domain.elements)

    return (Statistic("limit", "tensor", start),)


def _rows(parameters: ArceeFusionParameters, place: Place) -> int:
    return row_size(place)


@stage("arcee_fusion", "transform", ArceeFusionParameters, statistics=_limit, grain=_rows)
def arcee_fusion(delta: Tensor, parameters: ArceeFusionParameters, context: Context) -> Tensor:
    """Keep elements of importance |tau_j| ||tau_row|| >= median + k (third - first quartile), quartiles exact.

    A row is what goes into one output. Differs from mergekit (arcee_fusion), whose importance takes in the divergence
    of softmaxes of raw weights, which is rounding noise and negative for four in ten rows, and samples its quantiles.
    """
    import torch

    return torch.where(_importance(delta, context) >= context.statistics["limit"], delta, 0.0)


def _importance(delta: Tensor, context: Context) -> Tensor:
    """Of whole rows."""
    from ktmerge.merge.rows import map_rows

    return map_rows(delta, context, lambda rows: rows.abs() * rows.double().norm(dim=1, keepdim=True).float())


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
