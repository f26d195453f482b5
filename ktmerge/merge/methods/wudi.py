"""Merging by regression without data: a delta's own rows tell which inputs its expert saw (WUDI, SWUDI, ACTMat)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.checkpoints.classes import TensorClass
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Parameters, Promises, SplitFused, Stages, Tensor
from ktmerge.merge.weights import positive, relative

if TYPE_CHECKING:
    from ktmerge.merge.covariance import Covariance


class SpectralRegmeanParameters(Parameters):
    filter: Literal["none", "exp", "tikhonov"] = Field(
        "none", description="how far a direction goes from init to the regression: all the way, 1 - exp(-lambda T), or "
        "lambda / (lambda + ridge * mean lambda)",
    )  # fmt: skip
    time: Amount = Field(300.0, description="T of the exp filter: how long the gradient flow it stands for runs")
    ridge: Amount = Field(1e-3, description="of the tikhonov filter, relative to the mean eigenvalue")
    rank: Literal["all", "fraction", "energy", "nuclear", "stable", "participation"] = Field(
        "participation",
        description="how many directions take part: all, a fraction of the inputs, those that hold a share of the "
        "eigenvalues or of their roots, the stable rank, or the participation of the roots",
    )
    keep: float = Field(0.85, ge=0, le=1, description="the fraction or share of the rank rules that have one")
    init: Literal["mean", "sum", "zero"] = Field("mean", description="where directions stay that do not take part")
    cov_norm: Literal["fro2", "trace1", "none", "spectral"] = Field(
        "fro2", description="divide tau^T tau by its trace before the power, or after, by nothing, or by its largest"
    )
    cov_power: float = Field(1.0, gt=0, le=4, description="power of tau^T tau; below 1 flattens its spectrum")
    base_weight: Amount = Field(0.0, description="weight of the base as a member that wants no change; 0: none")
    base_cov: Literal["weights", "identity"] = Field(
        "weights", description="what the base's inputs look like: its weights' theta_0^T theta_0, or all the same"
    )
    split_fused: SplitFused = True


@stage("spectral_regmean", "combine", SpectralRegmeanParameters, reach="tensor", objection=positive)
def spectral_regmean(deltas: list[Tensor], parameters: SpectralRegmeanParameters, context: Context) -> Tensor:
    """Regression towards each expert on the inputs that its own delta stands for (arXiv:2606.07289; arXiv:2604.01329).

    C_t = tau_t^T tau_t / ||tau_t||^2, C = sum_t w_t C_t = V lambda V^T, D = sum_t w_t tau_t C_t, weights relative to
    their mean; M = M_0 + [(D V)(f / lambda) - (M_0 V) f] V^T. The mean where experts share inputs, the sum where they
    don't. Experts that did not change a map, or have weight 0, are no members; of a single one the delta is returned,
    but for init zero, which leaves out what takes no part.

    Differs from the paper's code: M_0 is the mean, not the sum, as directions left out would else keep N times the
    delta of equal experts; lambda is measured in units of C's trace over N, which makes T and the floor relative.
    """
    import torch

    from ktmerge.merge.covariance import of_delta
    from ktmerge.merge.decompositions import together
    from ktmerge.merge.matrices import by_map, changed
    from ktmerge.merge.regression import Filter
    from ktmerge.merge.regression import spectral_regmean as solve

    filter = Filter(parameters.filter, parameters.time, parameters.ridge, parameters.rank, parameters.keep)

    def merge(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        members = [t for t in changed(maps, base) if context.weights[t] > 0]
        if not members:
            return torch.zeros_like(base)
        if len(members) == 1 and parameters.init != "zero" and not parameters.base_weight:
            return maps[members[0]]
        own = [maps[t] for t in members]
        covariances = together(lambda one: of_delta(one, parameters.cov_norm, parameters.cov_power), own)
        weights = relative([context.weights[t] for t in members])
        return solve(own, covariances, filter, parameters.init, weights=weights, base=_base(base, parameters)).float()

    return by_map(deltas, context, merge, fused=parameters.split_fused)


def _base(base: Tensor, parameters: SpectralRegmeanParameters) -> Covariance | None:
    """C_0 of trace ``base_weight``, normalised as the experts' are, or None if the base is no member."""
    from ktmerge.merge.covariance import Covariance, of_delta

    if not parameters.base_weight:
        return None
    if parameters.base_cov == "identity":
        rows = base.double()[:0]
        return Covariance(rows, rows.new_full(base.shape[1:], parameters.base_weight / base.shape[1]))
    if not bool(base.any()):
        return None
    return of_delta(base, parameters.cov_norm, parameters.cov_power).scaled(parameters.base_weight)


MEAN = Stages(combine=("mean", {}))
MEANS: Mapping[TensorClass, Stages] = {"embed": MEAN, "vector": MEAN, "conv": MEAN}

_SOURCE = "Wei et al., 2026, arXiv:2606.07289, after Cheng et al., ICML 2025, arXiv:2503.08099"
_regressed = partial(
    method,
    otherwise=MEANS,
    promises=Promises(identical="mean", elements=False, rotations=True, tolerance=1e-5),
    semantics=2,
)
_EIGH = "eigh min(i, N o)^3 + N oi min(i, N o)"
_CHOLESKY = "N oi min(i, N o) + min(i, N o)^3 / 3; with weak directions eigh min(i, N o)^3"

_regressed(
    name="wudi_cf",
    summary="Several experts: what WUDI seeks by gradient steps, solved exactly; swudi_a damps its weak directions.",
    source="Cheng et al., ICML 2025, arXiv:2503.08099, solved in closed form",
    stages=Stages(combine=("spectral_regmean", {"filter": "none", "rank": "all"})),
    formula="(sum_t tau_t C_t)(sum_t C_t)^+, C_t = tau_t^T tau_t / ||tau_t||^2",
    cost=_CHOLESKY,
)
_regressed(
    name="actmat",
    summary="As wudi_cf, but experts that moved further count more.",
    source="arXiv:2604.01329",
    stages=Stages(combine=("spectral_regmean", {"filter": "none", "rank": "all", "cov_norm": "none"})),
    formula="(sum_t tau_t C_t)(sum_t C_t)^+, C_t = tau_t^T tau_t",
    cost=_CHOLESKY,
)
_regressed(
    name="swudi",
    summary="As swudi_a, with two knobs: how many directions take part, and how far the weak ones go.",
    source=_SOURCE,
    stages=Stages(combine=("spectral_regmean", {"filter": "exp", "rank": "fraction"})),
    formula="M_0 + [(D V)(f / l) - (M_0 V) f] V^T, f = 1 - exp(-l T) on the first keep * i directions, M_0 the mean",
    cost=_EIGH,
)
_regressed(
    name="swudi_a",
    summary="Several experts and no data: the first to try; adds what needs other inputs, averages what shares them.",
    source=_SOURCE,
    stages=Stages(combine=("spectral_regmean", {"filter": "none", "rank": "participation"})),
    formula="M_0 + (D V / l - M_0 V) V^T on the first (sum sqrt(l))^2 / sum(l) directions V, M_0 the mean",
    cost=_EIGH,
)
