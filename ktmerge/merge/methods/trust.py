"""Task arithmetic in the trust region, zero-shot: without the weights that several tasks move a lot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.kernels.codes import TRUST
from ktmerge.merge.program import Ruled, Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Observer, Parameters, Promises, Stages, Statistic, Tensor


class TrustParameters(Parameters):
    quantile: float = Field(0.99, gt=0, le=1, description="weights of a sensitivity above this quantile are dropped")
    scope: Literal["tensor", "global"] = Field("global", description="quantile of each tensor, or of the whole model")


def _statistics(parameters: TrustParameters) -> tuple[Statistic, ...]:
    if parameters.quantile == 1:
        return ()

    def start(elements: int) -> Observer:
        from ktmerge.merge.quantiles import Quantiles

        return Quantiles((parameters.quantile,), elements, _sensitivity)

    return (Statistic("limit", parameters.scope, start),)


def _compiled(parameters: TrustParameters, weights: Mapping[str, float]) -> Sum | Ruled:
    own = list(weights.values())
    if parameters.quantile == 1:
        return Sum(own)
    return Ruled(
        TRUST, own, asks="limit", scope=parameters.scope, share=parameters.quantile,
        answer=lambda limit: Ruled(TRUST, own, (limit,)),
    )  # fmt: skip


@stage("trust", "combine", TrustParameters, statistics=_statistics, compiled=_compiled)
def trust(deltas: list[Tensor], parameters: TrustParameters, context: Context) -> Tensor:
    """The sum of deltas where sum_{a != b} |tau_a| |tau_b| is not above its .99 quantile (arXiv:2501.15065, zero-shot).

    The paper's sensitivity sum_{a != b} |g_a| |tau_b| with |tau_a| for the gradient g_a. The quantile q of n elements
    is the ceil(q n)-th smallest; an element equal to it stays. Weights multiply the deltas.
    """
    import torch

    total = weighted_total(deltas, context.weights)
    if parameters.quantile == 1:
        return total
    return torch.where(_sensitivity(deltas, context) > context.statistics["limit"], 0.0, total)


def _sensitivity(deltas: list[Tensor], context: Context) -> Tensor:
    """Root of sum_{a != b} |tau_a| |tau_b|, which has the same order and does not underflow; fp32 from fp64."""
    import torch

    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    before = torch.zeros_like(total)
    for delta, weight in zip(deltas, context.weights, strict=True):
        own = (delta.double() * weight).abs()
        total += 2 * own * before
        before += own
    return total.sqrt().float()


method(
    name="tatr",
    summary="Several experts: task arithmetic without the hundredth of the weights that all of them move a lot.",
    source="Sun et al., 2025, arXiv:2501.15065, zero-shot",
    stages=Stages(combine=("trust", {})),
    lambda_=0.3,
    formula="sum_t w_t tau_t [O <= Q_q(O)], O = sum_{a != b} |tau_a| |tau_b|",
    cost="N oi, two passes",
    promises=Promises(neutral={"quantile": 1.0}, identical="sum"),
)
