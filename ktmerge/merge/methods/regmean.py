"""RegMean: for every linear map, and every norm, the least-squares fit to all experts' outputs on their own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.methods.mean import mean
from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.program import Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Need, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive, relative, shares

if TYPE_CHECKING:
    from ktmerge.merge.covariance import Covariance


class MemberParameters(Parameters):
    normalise: Literal["none", "trace"] = Field(
        "none", description="whether experts with larger inputs count for more, or every one alike"
    )
    base_weight: Amount = Field(
        0.0, description="weight of the base, on upstream inputs, as a member that wants no change; 0: none"
    )


class RegmeanParameters(MemberParameters):
    eta: float = Field(0.9, ge=0, le=1, description="factor on all covariances of two different inputs; 0: diagonal")
    ridge: float = Field(1e-3, ge=1e-9, le=1, description="pull towards the mean delta, relative to the mean variance")


class ScaleParameters(MemberParameters):
    vectors: bool = Field(
        False, description="fit the scales of norms, too, as LOT merging does, by what they multiply; else their mean"
    )


def _needs(parameters: RegmeanParameters) -> tuple[Need, ...]:
    experts = Need("inputs", "experts")
    return (experts, Need("inputs", "base")) if parameters.base_weight else (experts,)


@stage("regmean", "combine", RegmeanParameters, reach="tensor", needs=_needs, objection=positive)
def regmean(deltas: list[Tensor], parameters: RegmeanParameters, context: Context) -> Tensor:
    """M = [sum_t w_t tau_t G_t + rho mean(tau)] (sum_t w_t G_t + w_0 G_0 + rho I)^-1 (arXiv:2212.09849, eq. 2).

    G = X^T X / R with everything off the diagonal times eta, and w relative to its mean. An expert that did not change
    a map stays a member: it wants the base's answers on its inputs. With one expert and no base the delta is returned.

    Differs from the paper's code: deltas are merged, not weights, and the ridge rho pulls towards their mean: inputs
    that no sample has would else go to zero, not to the base.
    """
    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.regression import Filter, spectral_regmean
    from ktmerge.merge.sampled import Sampled

    if len(deltas) == 1 and not parameters.base_weight:
        return deltas[0]
    sampled = Sampled(context)
    weights = relative(context.weights)
    filter = Filter("tikhonov", strength=parameters.ridge)

    def merge(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        def covariance(expert: str) -> Covariance:
            found = sampled.covariance(expert, number, base.shape[1], parameters.eta)
            trace = found.trace()
            return found.scaled(1 / trace) if parameters.normalise == "trace" and trace > 0 else found

        anchor = covariance("").scaled(parameters.base_weight) if parameters.base_weight else None
        own = [covariance(expert) for expert in context.experts]
        return spectral_regmean(maps, own, filter, "mean", weights=weights, base=anchor).float()

    return by_map(deltas, context, merge, fused=False)


def _scale_needs(parameters: ScaleParameters) -> tuple[Need, ...]:
    experts = Need("scales", "experts")
    both = (experts, Need("scales", "base")) if parameters.base_weight else (experts,)
    return both if parameters.vectors else ()


@stage(
    "regmean_vectors", "combine", ScaleParameters, needs=_scale_needs, objection=positive,
    whole=lambda given: given.vectors,
    compiled=lambda given, weights: None if given.vectors else Sum(shares(weights.values())),
)  # fmt: skip
def regmean_vectors(deltas: list[Tensor], parameters: ScaleParameters, context: Context) -> Tensor:
    """Of a norm's scale sum_t w_t q_t tau_t / (sum_t w_t q_t + w_0 q_0), q = E x^2 of what it multiplies (LOT merging).

    The least-squares fit to the experts' outputs, element by element, as RegMean's of a linear map. Of a bias, which
    multiplies 1 everywhere, and of what is no norm's scale, it is the weighted mean; so it is where nothing went
    through a norm. An expert that did not use a norm has no say there. ``vectors: false``: the weighted mean.
    """
    if not parameters.vectors or (len(deltas) == 1 and not parameters.base_weight):
        return mean(deltas, parameters, context)
    import torch

    from ktmerge.merge.sampled import measurements

    measured = measurements(context)

    def energy(expert: str) -> Tensor:
        found = measured.scales(expert)
        if found is None:
            return torch.zeros_like(deltas[0], dtype=torch.float64)
        total = found.double().sum()
        return found.double() / total if parameters.normalise == "trace" and total > 0 else found.double()

    parts = [weight * energy(expert) for weight, expert in zip(relative(context.weights), context.experts, strict=True)]
    whole = torch.stack(parts).sum(0)
    if parameters.base_weight:
        whole += parameters.base_weight * energy("")
    fitted = torch.stack([part * delta.double() for part, delta in zip(parts, deltas, strict=True)]).sum(0)
    unused = mean(deltas, parameters, context)
    return torch.where(whole > 0, fitted / torch.where(whole > 0, whole, 1.0), unused.double()).float()


method(
    name="regmean",
    summary="Several experts and data: the least-squares fit to all their outputs, each on its own inputs.",
    source="Jin et al., ICLR 2023, arXiv:2212.09849",
    stages=Stages(combine=("regmean", {})),
    otherwise={**MEANS, "vector": Stages(combine=("regmean_vectors", {}))},
    formula="(sum_t w_t tau_t G_t + rho mean) (sum_t w_t G_t + w_0 G_0 + rho I)^-1",
    cost="i^3 / 3 + N R i^2",
    promises=Promises(identical="mean", elements=False, tolerance=1e-5),
    semantics=2,
)
