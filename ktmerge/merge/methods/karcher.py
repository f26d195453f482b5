"""Means of directions: the Karcher mean, and the normalised Euclidean mean that multi-SLERP comes down to."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from ktmerge.merge.methods.slerp import inner_products
from ktmerge.merge.program import Measured
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive


class KarcherParameters(Parameters):
    iterations: int = Field(10, ge=0, le=1000, description="steps towards the mean; 0 is the normalised mean")


def _compiled(parameters: KarcherParameters, weights: Mapping[str, float]) -> Measured:
    from ktmerge.merge.sphere import direction_coefficients

    own = list(weights.values())
    return Measured(
        "geometry", "tensor", lambda geometry: direction_coefficients(geometry, own, parameters.iterations)[0].tolist()
    )


@stage(
    "karcher", "combine", KarcherParameters, statistics=lambda _: inner_products(), objection=positive,
    compiled=_compiled,
)  # fmt: skip
def karcher(deltas: list[Tensor], parameters: KarcherParameters, context: Context) -> Tensor:
    """Mean length along the mean direction on the sphere (Karcher, 1977): d <- exp_d(sum_t w_t log_d(tau_t/|tau_t|)).

    Weights sum to 1 over the experts that moved the tensor; the length is sum_t w_t |tau_t|. Where directions cancel
    altogether there is no mean direction: the weighted mean instead. No ``iterations``: the normalised mean
    sum_t w_t tau_t / |tau_t| itself.
    Differs from mergekit, which takes the mean of weights, not deltas (siblings all but coincide there), rounds the
    directions to the checkpoint's type, knows no weights, and starts from the first expert where directions cancel.
    Differs from mergekit's multislerp, without iterations, only in name, and in leaving out experts that did not move
    the tensor: its step through the tangent space is zero, since the tangents are taken where they sum to zero.
    """
    from ktmerge.merge.gram import combined
    from ktmerge.merge.sphere import direction_coefficients

    geometry = context.statistics["geometry"]
    if geometry is None:
        return deltas[0].clone()
    coefficients = direction_coefficients(geometry, context.weights, parameters.iterations)
    return combined(deltas, coefficients, "tensor", context)


method(
    name="karcher",
    summary="Several experts: mean direction and mean length, so that averaging does not shrink what they did.",
    source="Karcher, 1977; mergekit's Karcher mean, arXiv:2603.04972",
    stages=Stages(combine=("karcher", {})),
    formula="(sum_t w_t |tau_t|) d, d = argmin sum_t w_t angle(d, tau_t)^2",
    cost="N^2 oi",
    promises=Promises(identical="mean", tolerance=1e-6),
    semantics=2,
)
method(
    name="nmean",
    summary="Several experts: their mean at their mean length; what mergekit calls multi-SLERP, in closed form.",
    source="mergekit's Multi-SLERP",
    stages=Stages(combine=("karcher", {"iterations": 0})),
    formula="(sum_t w_t |tau_t|) normalize(sum_t w_t tau_t / |tau_t|)",
    cost="N^2 oi",
    promises=Promises(identical="mean", tolerance=1e-6),
    semantics=2,
)
