"""Keep the largest changes and put the rest back to the base (the first step of TIES)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.program import Trim
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Domain, Method, Observer, Parameters, Promises, Stages, Statistic

if TYPE_CHECKING:
    from torch import Tensor


class TrimParameters(Parameters):
    density: float = Field(0.2, ge=0, le=1, description="fraction of the elements that is kept, exactly")
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="rank within each tensor, or among all elements of the expert"
    )


def _hash_key(context: Context) -> int:
    return stream_key(context.seed, "trim", context.expert, context.tensor)


def _threshold(parameters: TrimParameters) -> tuple[Statistic, ...]:
    def start(domain: Domain) -> Observer:
        from ktmerge.merge.kernels.radix import MagnitudeThreshold

        return MagnitudeThreshold(math.floor(parameters.density * domain.elements), domain.elements, _hash_key)

    return (Statistic("threshold", parameters.scope, start),)


def _compiled(parameters: TrimParameters) -> Trim:
    return Trim(parameters.density, parameters.scope, "trim")


@stage("trim", "transform", TrimParameters, statistics=_threshold, compiled=_compiled)
def trim(delta: Tensor, parameters: TrimParameters, context: Context) -> Tensor:
    """Keep the k = floor(density n) elements of largest magnitude (arXiv:2306.01708, 4.1).

    Equal magnitudes at the edge are decided by a hash of (seed, expert, tensor, element), so that exactly k stay and no
    rows are preferred.
    """
    threshold = context.statistics["threshold"]
    return context.kernels.keep(delta, _hash_key(context), context.start, threshold)


method(
    Method(
        name="trim",
        summary="One expert: keep only its largest changes, give the rest back to the base.",
        source="Yadav et al., NeurIPS 2023, arXiv:2306.01708, with one task",
        stages=Stages(transform=(("trim", {}),), combine=("sum", {})),
        experts=(1, 1),
        promises=Promises(neutral={"density": 1.0}, identical="other"),
    )
)
