"""Merging by Fisher information: every element goes where the model that needs it most wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from ktmerge.merge.arithmetic import quotient
from ktmerge.merge.kernels.codes import INFORMED
from ktmerge.merge.program import Ruled, Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Need, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive


class InformationParameters(Parameters):
    norm: Literal["global", "none"] = Field(
        "global", description="divide each model's Fisher information by its norm over all tensors, or take it as it is"
    )
    floor: float = Field(1e-6, ge=0, le=1, description="added to it everywhere, in units of that norm")


class FisherParameters(InformationParameters):
    base_weight: Amount = Field(
        0.0, description="weight of the base, on upstream data, as a member that wants no change; 0: none"
    )


class FisherBackParameters(InformationParameters):
    a: float = Field(0.5, ge=0, le=1, description="trust in the experts: 0 is the base, 1 the tuned model")


BOTH = (Need("fisher", "base"), Need("fisher", "experts"))


def _needs(parameters: FisherParameters) -> tuple[Need, ...]:
    return BOTH if parameters.base_weight else BOTH[1:]


def _compiled(parameters: FisherParameters, weights: Mapping[str, float]) -> Sum | Ruled:
    if len(weights) == 1 and not parameters.base_weight:
        return Sum([1.0])
    return _ruled(parameters, list(weights.values()), parameters.base_weight)


def _compiled_back(parameters: FisherBackParameters, weights: Mapping[str, float]) -> Sum | Ruled:
    if parameters.a == 0 or (parameters.a == 1 and len(weights) == 1):
        return Sum([parameters.a] * len(weights))
    return _ruled(parameters, _shares(parameters.a, list(weights.values())), 1 - parameters.a)


def _ruled(parameters: InformationParameters, weights: Sequence[float], base_weight: float) -> Ruled:
    numbers = (parameters.floor, base_weight, float(parameters.norm == "global"))
    return Ruled(INFORMED, weights, numbers, asks="information")


def _shares(a: float, weights: Sequence[float]) -> list[float]:
    whole = sum(weights)
    return [a * weight / whole for weight in weights]


@stage("fisher", "combine", FisherParameters, needs=_needs, objection=positive, compiled=_compiled)
def fisher(deltas: list[Tensor], parameters: FisherParameters, context: Context) -> Tensor:
    """M = sum_t w_t F_t tau_t / (sum_t w_t F_t + w_0 F_0), element by element (arXiv:2111.09832, eq. 3).

    F <- F / ||F|| + floor, the norm over all of a model's tensors. Where no model has any information, all count by
    their weights. With one expert and no base the delta is returned.

    Differs from the paper's code: the floor is on every model, not on the favoured one.
    """
    if len(deltas) == 1 and not parameters.base_weight:
        return deltas[0]
    return _merged(deltas, context, parameters, context.weights, parameters.base_weight)


@stage(
    "fisher_back", "combine", FisherBackParameters, needs=lambda _: BOTH, objection=positive, compiled=_compiled_back
)
def fisher_back(deltas: list[Tensor], parameters: FisherBackParameters, context: Context) -> Tensor:
    """M = a sum_t w_t F_t tau_t / ((1-a) F_0 + a sum_t w_t F_t), weights as shares of their sum (arXiv:2111.09832).

    The base is the other model of a Fisher merge: elements that upstream data needs stay, EWC's penalty after the fact.
    F <- F / ||F|| + floor, the norm over all of a model's tensors.
    """
    import torch

    if parameters.a == 0:
        return torch.zeros_like(deltas[0])
    if parameters.a == 1 and len(deltas) == 1:
        return deltas[0]
    return _merged(deltas, context, parameters, _shares(parameters.a, context.weights), 1 - parameters.a)


def _merged(
    deltas: Sequence[Tensor],
    context: Context,
    parameters: InformationParameters,
    weights: Sequence[float],
    base_weight: float,
) -> Tensor:
    """sum_t w_t F_t tau_t / (sum_t w_t F_t + w_0 F_0), and the plain weighted mean where no F is above 0."""
    import torch

    wanted = torch.zeros_like(deltas[0], dtype=torch.float64)
    total, plain = wanted.clone(), wanted.clone()
    for delta, expert, weight in zip(deltas, context.experts, weights, strict=True):
        known = information(context, expert, parameters.norm, parameters.floor) * weight
        wanted += known * delta
        total += known
        plain += weight * delta.double()
    if base_weight:
        total += information(context, "", parameters.norm, parameters.floor) * base_weight
    return torch.where(total > 0, wanted / total, quotient(plain, sum(weights) + base_weight)).float()


def information(context: Context, expert: str, norm: str, floor: float) -> Tensor:
    """F / ||F|| + floor, or F + floor ||F||, of the piece at hand, float64; of the base if ``expert`` is empty."""
    from ktmerge.merge.sampled import measurements

    if not context.base.numel():
        return context.base.double()
    measured = measurements(context)
    size = measured.fisher_norm(expert)
    values = measured.fisher(expert).double().reshape(context.base.shape)
    if norm == "none":
        return values + floor * size
    return (quotient(values, size) if size > 0 else values) + floor


method(
    name="fisher",
    summary="Several experts and gradients on their data: each element from whom it matters to most.",
    source="Matena and Raffel, NeurIPS 2022, arXiv:2111.09832",
    stages=Stages(combine=("fisher", {})),
    formula="sum_t w_t F_t tau_t / (sum_t w_t F_t + w_0 F_0)",
    promises=Promises(identical="mean", elements=False, tolerance=1e-6),
)
method(
    name="fisher_back",
    summary="Gradients on data of both sides: what upstream data needs goes back to the base, element by element.",
    source="Matena and Raffel, NeurIPS 2022, arXiv:2111.09832, with the base as the other model",
    stages=Stages(combine=("fisher_back", {})),
    formula="a sum_t w_t F_t tau_t / ((1-a) F_0 + a sum_t w_t F_t)",
    promises=Promises(neutral={"a": 1.0}, nothing={"a": 0.0}, identical="mean", elements=False, tolerance=1e-6),
)
