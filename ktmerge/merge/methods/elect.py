"""Sign election and disjoint mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Elect
from ktmerge.merge.registry import stage
from ktmerge.merge.stage import Context, OnePass, Parameters, Scope, Statistic, Tensor
from ktmerge.merge.weights import positive, used

IGNORE_WEIGHTS = ("mean", "max")
_AGGREGATES: dict[str, Literal["sum", "largest"]] = {"sum": "sum", "max": "largest"}


class ElectParameters(Parameters):
    elect: Literal["weighted", "mass", "count"] = Field(
        "weighted", description="sign of the weighted sum of deltas, of their plain sum, or of the number of votes"
    )
    aggregate: Literal["wmean", "mean", "wsum_over_count", "sum", "max"] = Field(
        "wmean",
        description="of the deltas that agree with the elected sign: weighted mean, mean, weighted sum over their "
        "number, weighted sum, or the largest",
    )
    tie: Literal["zero", "majority", "plus"] = Field(
        "zero", description="when the vote is exactly even: drop the element, take the majority of all signs, or plus"
    )
    scope: Literal["tensor", "row", "global"] = Field(
        "tensor", description="whose signs make the majority that breaks ties: the tensor's (row too), or all"
    )


def _objection(parameters: ElectParameters, weights: Mapping[str, float]) -> str | None:
    if objection := positive(parameters, weights):
        return objection
    if parameters.aggregate in IGNORE_WEIGHTS and len(set(weights.values())) > 1:
        return f"aggregate '{parameters.aggregate}' would ignore the unequal expert weights; use wmean"
    return None


class _SignBalance(OnePass):
    """Observer of the sum of all elected signs; its sign is the majority."""

    def __init__(self, parameters: ElectParameters) -> None:
        self._parameters = parameters
        self._balance = 0

    def observe(self, values: list[Tensor], context: Context) -> None:
        weights = relative(used(context.weights, context.weights))
        votes = _vote(used(values, context.weights), self._parameters, weights)
        self._balance += int((votes > 0).sum()) - int((votes < 0).sum())

    def result(self) -> int:
        return (self._balance > 0) - (self._balance < 0)


def _majority(parameters: ElectParameters) -> tuple[Statistic, ...]:
    if parameters.tie != "majority":
        return ()

    scope: Scope = "global" if parameters.scope == "global" else "tensor"
    return (Statistic("majority", scope, lambda elements: _SignBalance(parameters)),)


def _compiled(parameters: ElectParameters, weights: Mapping[str, float]) -> Elect | None:
    asks_all = parameters.elect != "weighted" or parameters.aggregate == "wsum_over_count"
    if parameters.tie == "majority" or (asks_all and not all(weights.values())):
        return None
    own, equal = relative(list(weights.values())), [1.0] * len(weights)
    return Elect(
        votes=own if parameters.elect == "weighted" else equal,
        weights=equal if parameters.aggregate == "mean" else own,
        shares=own if parameters.aggregate == "wmean" else equal,
        aggregate=_AGGREGATES.get(parameters.aggregate, "mean"),
        counted=parameters.elect == "count",
        fallback=1.0 if parameters.tie == "plus" else 0.0,
    )


@stage("elect", "combine", ElectParameters, statistics=_majority, objection=_objection, compiled=_compiled)
def elect(deltas: list[Tensor], parameters: ElectParameters, context: Context) -> Tensor:
    """Per element, elect a sign and merge only the deltas that have it (arXiv:2306.01708, 4.2-4.3).

    s = sign(sum_t w_t tau_t) and A = {t: sign tau_t = s, tau_t != 0}; M = sum_A w_t tau_t / sum_A w_t for ``wmean``.
    Weights are taken relative to the largest, so that equal weights are exactly 1 and the paper's formula remains.
    An element nobody votes for stays the base's.
    """
    import torch

    deltas, weights = used(deltas, context.weights), relative(used(context.weights, context.weights))
    sign = torch.sign(_vote(deltas, parameters, weights))
    if parameters.tie != "zero":
        fallback = 1 if parameters.tie == "plus" else context.statistics["majority"]
        sign = torch.where(sign == 0, float(fallback), sign)
    if parameters.aggregate == "max":
        largest = torch.zeros_like(sign)
        for delta in deltas:
            largest = torch.maximum(largest, delta * sign)
        return largest * sign
    return disjoint(deltas, sign, parameters.aggregate, weights)


def relative(weights: Sequence[float]) -> list[float]:
    """Weights divided by the largest."""
    largest = max(weights)
    return [weight / largest for weight in weights]


def _vote(deltas: list[Tensor], parameters: ElectParameters, weights: list[float]) -> Tensor:
    """A number per element whose sign is the elected one."""
    import torch

    equal = [1.0] * len(deltas)
    if parameters.elect == "count":
        return weighted_total([torch.sign(delta) for delta in deltas], equal)
    return weighted_total(deltas, weights if parameters.elect == "weighted" else equal)


def disjoint(deltas: list[Tensor], sign: Tensor, aggregate: str, weights: list[float]) -> Tensor:
    """Sum over the agreeing experts, divided by their weight or number; 0 where nobody agrees."""
    import torch

    equal = [1.0] * len(deltas)
    agreeing = [(delta * sign) > 0 for delta in deltas]
    values = [torch.where(agrees, delta, 0.0) for delta, agrees in zip(deltas, agreeing, strict=True)]
    total = weighted_total(values, equal if aggregate == "mean" else weights)
    if aggregate == "sum":
        return total
    share = weighted_total([agrees.float() for agrees in agreeing], weights if aggregate == "wmean" else equal)
    return torch.where(share > 0, total / share, 0.0)
