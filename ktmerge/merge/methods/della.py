"""DELLA: drop changes at random, small ones more likely, and rescale the rest so that their expectation stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ktmerge.merge.arithmetic import quotient
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.matrices import row_size
from ktmerge.merge.methods.dare import LEFT_OUT
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor


class MagpruneParameters(Parameters):
    density: float = Field(0.5, ge=0, le=1, description="mean chance of an element to be kept")
    epsilon: float = Field(
        0.1, ge=0, le=0.5, description="the smallest of a row is kept with chance density - epsilon, the largest with +"
    )
    rescale: Literal["elementwise", "scalar", "none"] = Field(
        "elementwise", description="kept elements by 1 / their chance, all to the tensor's former L1 norm, or unchanged"
    )


def _objection(parameters: MagpruneParameters, weights: Mapping[str, float]) -> str | None:
    density, epsilon = parameters.density, parameters.epsilon
    if 0 < density < 1 and epsilon and not (density - epsilon > 0 and density + epsilon < 1):
        return (
            f"epsilon {epsilon:g} around density {density:g} gives chances outside 0 to 1; "
            f"take epsilon below {min(density, 1 - density):g}"
        )
    return None


@stage(
    "magprune", "transform", MagpruneParameters, objection=_objection, whole=lambda given: given.rescale == "scalar",
    grain=lambda _, place: row_size(place),
)  # fmt: skip
def magprune(delta: Tensor, parameters: MagpruneParameters, context: Context) -> Tensor:
    """Keep elements with a chance that grows with their rank, and divide by it (MagPrune, arXiv:2406.11617, 3.1).

    pi = (d - epsilon) + 2 epsilon r, r from 0 to 1 linear in the rank of |tau| among what goes into the same output (a
    vector: in all of it; a row of one element: r = 1/2); m ~ Bernoulli(pi), m tau / pi. Density 1 and 0 keep all and
    nothing. The draws are those of dare, which this is for epsilon 0.
    Differs from mergekit, whose one factor for the whole tensor (``scalar``) makes large changes too large on average.
    """
    import torch

    from ktmerge.merge.rows import by_row

    if parameters.density in (0, 1):
        return delta if parameters.density else torch.zeros_like(delta)
    draws = context.kernels.draws(
        stream_key(context.seed, "dare", context.expert, context.tensor), context.start, delta.numel(), delta.device
    )

    def choose(rows: Tensor, ranks: Tensor, elements: Tensor) -> Tensor:
        last = rows.shape[1] - 1
        r = quotient(ranks.double(), last) if last else torch.full_like(ranks, 0.5, dtype=torch.float64)
        chances = (parameters.density - parameters.epsilon) + 2 * parameters.epsilon * r
        kept = torch.where(draws[elements - context.start] < (chances * 2**32).round(), rows, 0.0)
        return kept * (1 / chances).float() if parameters.rescale == "elementwise" else kept

    pruned = by_row(delta, context, stream_key(context.seed, "magprune", context.expert, context.tensor), choose)
    return pruned * _ratio(delta, pruned) if parameters.rescale == "scalar" else pruned


def _ratio(delta: Tensor, pruned: Tensor) -> float:
    """||tau||_1 / ||m tau||_1."""
    from ktmerge.merge.kernels.sums import ExactSum
    from ktmerge.merge.rows import pieces

    before, after = ExactSum(1), ExactSum(1)
    for whole, left in zip(pieces(delta), pieces(pruned), strict=True):
        before.add(whole)
        after.add(left)
    return float(before.value() / after.value()) if after.value() else 0.0


method(
    name="della",
    summary="As dare_ties, but the larger a change, the likelier it is kept; signs are elected afterwards.",
    source="Deep et al., 2024, arXiv:2406.11617",
    stages=Stages(transform=(("magprune", {}),), combine=("elect", {})),
    lambda_=1.1,
    otherwise=dict.fromkeys(LEFT_OUT, Stages(combine=("elect", {}))),
    formula="disjoint mean, by elected sign, of m tau_t / pi, m ~ Bernoulli(pi), pi by rank in the row",
    cost="N oi log i",
    promises=Promises(neutral={"density": 1.0}, identical="other", elements=False),
    semantics=3,
)
method(
    name="della_linear",
    summary="As dare, but the larger a change, the likelier it is kept; what is left is added.",
    source="Deep et al., 2024, arXiv:2406.11617",
    stages=Stages(transform=(("magprune", {}),), combine=("sum", {})),
    lambda_=1.1,
    otherwise=dict.fromkeys(LEFT_OUT, Stages(combine=("sum", {}))),
    formula="sum_t w_t m tau_t / pi, m ~ Bernoulli(pi), pi by rank in the row",
    cost="N oi log i",
    promises=Promises(neutral={"density": 1.0}, identical="other", elements=False, unbiased=True),
    semantics=3,
)
