"""Common, then specific: what experts agree on is averaged, what each has for itself is merged by regression."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Tensor

if TYPE_CHECKING:
    from ktmerge.merge.common import Shared


class CtsParameters(Parameters):
    residual: Literal["swudi_a", "wudi_cf", "sum", "root", "mean"] = Field(
        "swudi_a",
        description="how the specific parts are merged: by regression on the leading or on all directions, or their "
        "sum, their sum over sqrt(N), their mean",
    )
    mu: float = Field(1.0, ge=0, le=2, description="weight of the specific part; 0 leaves only what is common")
    power: float = Field(
        1.0, ge=0, le=1, description="of the common part's singular values, at one norm; 0.5 raises its weak directions"
    )
    split_fused: SplitFused = True


@stage("cts", "combine", CtsParameters, reach="tensor")
def cts(deltas: list[Tensor], parameters: CtsParameters, context: Context) -> Tensor:
    """Average what is coherent, direction by direction, and merge the rest as each expert's own.

    In the eigenvectors V of sum_t tau_t^T tau_t / ||tau_t||^2 with a_t = tau_t V: coherence
    kappa_r = ||sum_t a_tr||^2 / (N sum_t ||a_tr||^2), gate g_r = clip((kappa_r - 1/N) / (1 - 1/N), 0, 1), common part
    tau_c = mean_t(a_t) diag(g) V^T, specific parts sigma_t = tau_t - a_t diag(g) V^T, M = tau_c + mu merge(sigma).
    The regressions take each expert's covariance from its whole delta, which tells of its inputs as before, so that one
    decomposition serves both parts. Equal experts give the one; experts that read different inputs give, with
    ``residual: sum``, their sum. Of a single expert that changed a map the delta is returned.
    ``power`` p below 1 makes the common part U S^p V^T at its former Frobenius norm: soft isotropy (arXiv:2502.04959).

    The formula has no weights: each delta is multiplied by its weight over the mean of their magnitudes.
    """
    from ktmerge.merge.common import shared
    from ktmerge.merge.methods.isotropy import evened
    from ktmerge.merge.spectra import combined

    def merge(own: list[Tensor]) -> Tensor:
        if len(own) == 1:
            return own[0]
        found = shared(own)
        gate = found.gate()
        common = found.mean() * gate
        if parameters.power < 1:
            common = evened(common, parameters.power, "frobenius")
        merged = common + parameters.mu * _specific(found, gate, parameters.residual)
        return found.frame.back(merged)

    return combined(deltas, context, merge, fused=parameters.split_fused)


def _specific(found: Shared, gate: Tensor, rule: str) -> Tensor:
    """The specific parts merged, in the shared frame ``[o, r]``."""
    import torch

    from ktmerge.merge.regression import Filter

    count = len(found.responses)
    added = found.mean() * (count * (1 - gate))
    if rule in ("sum", "root", "mean"):
        return added / {"sum": 1.0, "root": math.sqrt(count), "mean": float(count)}[rule]
    start = added / count
    target = torch.zeros_like(start)
    for response in found.responses:
        target += _times(response * (1 - gate), response)
    values = found.frame.eigenvalues
    rank: Literal["all", "participation"] = "all" if rule == "wudi_cf" else "participation"
    passed = Filter("none", rank=rank).of(values, 1.0, 0.0, values.numel())
    return start + (target / values - start) * passed


def _times(specific: Tensor, response: Tensor) -> Tensor:
    """sigma C_t in the frame, C_t = a_t^T a_t / ||a_t||^2."""
    from ktmerge.merge.covariance import gram

    outputs, directions = response.shape
    energy = (response**2).sum()
    if directions < outputs:
        return specific @ gram(response) / energy
    return (specific @ response.T) @ response / energy


method(
    name="cts",
    summary="Several experts, no data: average what they agree on, keep what only one of them learned.",
    source="ktmerge; the regression of what is specific after arXiv:2606.07289",
    stages=Stages(combine=("cts", {})),
    otherwise=MEANS,
    formula="mean(a) g V^T + mu merge(tau - a g V^T), a = tau V, g = clip((k - 1/N) / (1 - 1/N), 0, 1)",
    cost="eigh min(i, N o)^3 + N oi min(i, N o)",
    promises=Promises(identical="mean", elements=False, rotations=True, tolerance=1e-5),
    semantics=3,
)
