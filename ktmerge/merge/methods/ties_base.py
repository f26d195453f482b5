"""TIES with a vote for the base, the heavier the more upstream data excite an input."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.methods.elect import disjoint, relative
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Need, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive


class BaseVoteParameters(Parameters):
    kappa: Amount = Field(
        0.5, description="the base's vote at an input of mean square, as a share of what all experts could muster"
    )


def _needs(parameters: BaseVoteParameters) -> tuple[Need, ...]:
    return (Need("inputs", "base"),) if parameters.kappa else ()


@stage("elect_base", "combine", BaseVoteParameters, reach="tensor", needs=_needs, objection=positive)
def elect_base(deltas: list[Tensor], parameters: BaseVoteParameters, context: Context) -> Tensor:
    """As elect, where the base votes for no change: |sum_t w_t tau_t| must exceed kappa r_j sum_t w_t |tau_t|.

    r_j = sqrt(E x_j^2 / mean_i E x_i^2) over the upstream inputs of the linear map: a change of weights that upstream
    data use much needs more agreement among the experts, one that they never use needs none. kappa 0 is elect.
    """
    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.sampled import Sampled

    weights = relative(context.weights)
    if not parameters.kappa:
        return _elected(deltas, weights, 0.0)
    sampled = Sampled(context)

    def merge(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        squares = sampled.covariance("", number, base.shape[1], 0.0).diagonal
        mean = squares.mean()
        return _elected(maps, weights, parameters.kappa * (squares / mean).sqrt() if mean > 0 else 0.0)

    return by_map(deltas, context, merge, fused=False)


def _elected(deltas: Sequence[Tensor], weights: list[float], share: Tensor | float) -> Tensor:
    """The disjoint mean where the sum is more than ``share`` of the sum of magnitudes; 0 elsewhere."""
    import torch

    total = weighted_total(deltas, weights)
    mass = weighted_total([delta.abs() for delta in deltas], weights)
    sign = torch.where(total.abs().double() > mass.double() * share, torch.sign(total), 0.0)
    return disjoint(list(deltas), sign, "wmean", weights)


# Without inputs of their own, embeddings, norms and biases are merged as TIES merges them.
_TIES = Stages(transform=(("trim", {}),), combine=("elect", {}))

method(
    name="ties_base",
    summary="As ties, with upstream data: changes of inputs that the base uses much need more agreement.",
    source="ktmerge; the election of arXiv:2306.01708 with the base as a voter",
    stages=Stages(transform=(("trim", {}),), combine=("elect_base", {})),
    otherwise={"embed": _TIES, "vector": _TIES, "conv": _TIES},
    formula="elect(trim tau_t) where |sum_t w_t tau_t| > kappa r_j sum_t w_t |tau_t|, else 0; r_j^2 ~ E x_j^2",
    cost="N oi + R i",
    promises=Promises(neutral={"density": 1.0, "kappa": 0.0}, identical="other", elements=False),
    semantics=2,
)
