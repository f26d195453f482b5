"""Back-merge by a Wiener filter: strong directions of a delta stay, weak ones shrink."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Tensor


class WienerParameters(Parameters):
    a: float = Field(0.8, ge=0, le=1, description="trust in the experts: 0 is the base, 1 the tuned model")
    prior: Literal["identity", "weights"] = Field(
        "identity", description="what upstream inputs look like: all directions alike, or as theta_0^T theta_0 has them"
    )
    level: Literal["trust", "noise"] = Field(
        "trust",
        description="with prior identity, where shrinking sets in: by a, or at the noise level that the median "
        "singular value tells; then a has no say",
    )
    split_fused: SplitFused = True


@stage("wiener", "transform", WienerParameters, reach="tensor")
def wiener(delta: Tensor, parameters: WienerParameters, context: Context) -> Tensor:
    """Regression between the base and the expert with covariances told by the weights alone.

    tau' = tau a C_d ((1 - a) C_u + a C_d)^-1, C_d = tau^T tau / ||tau||^2. With C_u = I / i, s_k' = s_k^3 / (s_k^2 +
    nu^2), nu^2 = (1 - a) / a ||tau||^2 / i; or nu = median(s) / mu, the noise level of DG-Hard. With ``weights`` C_u =
    theta_0^T theta_0 / ||theta_0||^2.
    """
    import torch

    from ktmerge.merge.covariance import of_delta
    from ktmerge.merge.regression import Filter, spectral_regmean
    from ktmerge.merge.spectra import noise, one_sided, transformed

    a, by_noise = parameters.a, parameters.level == "noise" and parameters.prior == "identity"
    if a == 1 and not by_noise:
        return delta

    def shrink(own: Tensor, base: Tensor) -> Tensor:
        if a == 0 and not by_noise:
            return torch.zeros_like(own)
        if parameters.prior == "weights":
            if not bool(base.any()):
                return own
            upstream = of_delta(base).scaled(1 - a)
            return spectral_regmean([own], [of_delta(own)], Filter(), "zero", weights=[a], base=upstream).float()
        found = one_sided(own)
        if by_noise:
            nu2 = noise(found.values, (own.shape[0], own.shape[1])) ** 2
        else:
            nu2 = (1 - a) / a * float((found.values**2).sum()) / own.shape[1]
        squares = found.values[found.values > 0] ** 2
        return found.filtered(squares / (squares + nu2)).float()

    return transformed(delta, context, shrink, fused=parameters.split_fused)


method(
    name="wiener",
    summary="One expert and no data: shrink weak directions of the change more than strong ones; one knob a.",
    source="ktmerge; Wiener's filter with the covariances of arXiv:2503.08099",
    stages=Stages(transform=(("wiener", {}),), combine=("mean", {})),
    otherwise=MEANS,
    formula="U (s^3 / (s^2 + n^2)) V^T of tau = U S V^T, n^2 = (1 - a) / a ||tau||^2 / i",
    cost="eigh min(o, i)^3; prior weights: eigh min(i, 2 o)^3",
    promises=Promises(neutral={"a": 1.0}, identical="mean", elements=False, rotations=True, tolerance=1e-5),
    semantics=3,
)
