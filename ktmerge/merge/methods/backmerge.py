"""RegMean back-merge: answer upstream inputs as the base does and downstream inputs as the experts do."""

from __future__ import annotations

from pydantic import Field

from ktmerge.checkpoints.classes import TensorClass
from ktmerge.merge.program import Ramp
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Need, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive, shares, used


class TrustParameters(Parameters):
    a: float = Field(0.5, ge=0, le=1, description="trust in the experts: 0 is the base, 1 the tuned model")


class BackParameters(TrustParameters):
    eta: float = Field(0.9, ge=0, le=1, description="factor on all covariances of two different inputs; 0: diagonal")
    ridge: float = Field(1e-3, ge=1e-9, le=1, description="added to every input's variance, relative to the mean one")
    prior_u: Amount = Field(0.0, description="more of that upstream: pulls directions no sample has to the base")
    prior_d: Amount = Field(0.0, description="more of it downstream: pulls them to the tuned model")


NEEDS = (Need("inputs", "base"), Need("inputs", "experts"))


@stage("interpolate", "scale", TrustParameters, compiled=lambda given: Ramp(given.a))
def interpolate(merged: Tensor, parameters: TrustParameters, context: Context) -> Tensor:
    """M times a: plain interpolation, with the knob of the methods that merge back."""
    import torch

    if parameters.a == 1:
        return merged
    return merged * parameters.a if parameters.a else torch.zeros_like(merged)


@stage("regmean_back", "combine", BackParameters, reach="tensor", needs=lambda _: NEEDS, objection=positive)
def regmean_back(deltas: list[Tensor], parameters: BackParameters, context: Context) -> Tensor:
    """Least squares between the base on upstream inputs and the experts on theirs (after arXiv:2212.09849, eq. 2).

    M = a D ((1-a) C_u + a C_d)^-1, D = sum_t w_t tau_t C_t, C_d = sum_t w_t C_t, weights as shares of their sum; every
    covariance shrunk, C <- eta C + (1-eta) diag(C), then given (ridge + prior) m on the diagonal, m the mean variance
    of upstream and downstream inputs together.
    So a = 1 with one expert is the expert, a = 0 the base, and C_u = C_d plain interpolation. Maps that share a tensor
    share their inputs too: rows are independent, and nothing is to be taken apart. An expert that did not change a map
    stays a member: it wants the base's answers on its inputs.
    """
    import torch

    from ktmerge.merge.curve import back, with_priors
    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.sampled import Sampled

    if parameters.a == 0:
        return torch.zeros_like(deltas[0])
    if parameters.a == 1 and len(deltas) == 1:
        return deltas[0]
    sampled = Sampled(context)
    own = shares(context.weights)

    def merge(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        wide = base.shape[1]
        upstream, downstream = with_priors(
            sampled.covariance("", number, wide, parameters.eta),
            [sampled.covariance(expert, number, wide, parameters.eta) for expert in used(context.experts, own)],
            parameters.ridge + parameters.prior_u,
            parameters.ridge + parameters.prior_d,
        )
        return back(used(maps, own), used(own, own), upstream, downstream, parameters.a).float()

    return by_map(deltas, context, merge, fused=False)


TRUST = Stages(combine=("mean", {}), scale=(("interpolate", {}),))
TRUSTED: dict[TensorClass, Stages] = {"embed": TRUST, "vector": TRUST, "conv": TRUST}
"""What has no linear map: interpolated by the same a."""

_PROMISES = Promises(neutral={"a": 1.0}, nothing={"a": 0.0}, identical="mean", elements=False, tolerance=1e-5)

method(
    name="regmean_back",
    summary="Data of both sides: give back to the base what its own inputs feel, keep what only new inputs feel.",
    source="Jin et al., ICLR 2023, arXiv:2212.09849, with the base as a member",
    stages=Stages(combine=("regmean_back", {})),
    otherwise=TRUSTED,
    formula="a D ((1-a) C_u + a C_d)^-1, D = sum_t w_t tau_t C_t, C_d = sum_t w_t C_t",
    cost="i^3 / 3 + R i^2 + N oi R",
    promises=_PROMISES,
    semantics=2,
)
method(
    name="diag_back",
    summary="As regmean_back, but by each input's own variance alone: cheaper, and needs fewer samples.",
    source="arXiv:2212.09849 with diagonal covariances; importance as in Wanda, arXiv:2306.11695",
    stages=Stages(combine=("regmean_back", {"eta": 0.0})),
    otherwise=TRUSTED,
    formula="tau_ij a E_d[x_j^2] / ((1-a) E_u[x_j^2] + a E_d[x_j^2])",
    cost="N oi",
    promises=_PROMISES,
    semantics=2,
)
