"""Consensus task arithmetic: only what several experts find useful in the sum."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.kernels.codes import CONSENSUS
from ktmerge.merge.program import Ruled, Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Parameters, Promises, Stages, Tensor


class ConsensusParameters(Parameters):
    selectivity: Amount = Field(
        0.4, description="an expert votes where its change is above this times what the others add to it"
    )
    agree: int = Field(2, ge=0, description="how many experts must vote; 0 is task arithmetic")


def _compiled(parameters: ConsensusParameters, weights: Mapping[str, float]) -> Sum | Ruled:
    own = list(weights.values())
    return Ruled(CONSENSUS, own, (parameters.selectivity, parameters.agree)) if parameters.agree else Sum(own)


@stage("consensus", "combine", ConsensusParameters, compiled=_compiled)
def consensus(deltas: list[Tensor], parameters: ConsensusParameters, context: Context) -> Tensor:
    """The sum where at least k experts vote: S * [sum_t m_t >= k], m_t = |tau_t| > l |S - tau_t| (arXiv:2405.07813).

    S = sum_t tau_t is the sum before lambda, deltas times their weights; m_t are the paper's TALL masks, of one
    l for all experts instead of one found for each on validation data. What nobody or one expert wants ("catastrophic",
    "selfish") is dropped with k = 2; k = 0 keeps all, and with k above the number of experts nothing remains.
    """
    import torch

    total = weighted_total(deltas, context.weights)
    if parameters.agree == 0:
        return total
    # fp64: deltas of bf16 checkpoints are a few units in the last place, so that the two sides are often equal
    scaled = [delta.double() * weight for delta, weight in zip(deltas, context.weights, strict=True)]
    exact = weighted_total(scaled, [1.0] * len(scaled))
    votes = torch.zeros_like(total)
    for own in scaled:
        votes += own.abs() > parameters.selectivity * (exact - own).abs()
    return torch.where(votes >= parameters.agree, total, 0.0)


method(
    name="consensus",
    summary="Many experts: task arithmetic without what serves only one of them, or none.",
    source="Wang et al., ICML 2024, arXiv:2405.07813",
    stages=Stages(combine=("consensus", {})),
    lambda_=0.4,
    formula="S [#{t: |tau_t| > l |S - tau_t|} >= k], S = sum_t w_t tau_t",
    promises=Promises(neutral={"agree": 1}, identical="sum", nothing={"agree": 99}),
)
