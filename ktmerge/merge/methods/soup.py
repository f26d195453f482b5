"""Averages of runs and of checkpoints of one run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Parameters, Promises, Stages, Tensor


class SoupParameters(Parameters):
    base_weight: Amount = Field(0.0, description="weight of the base as one of the models; 1 for an equal share")


class EmaParameters(Parameters):
    beta: float = Field(0.9, ge=0, le=1, description="weight of a checkpoint relative to the next; 1: all alike (LAWA)")


def _soup_objection(parameters: SoupParameters, weights: Mapping[str, float]) -> str | None:
    if sum(weights.values()) + parameters.base_weight == 0:
        return "a soup divides by the sum of the expert weights and base_weight, which is 0"
    return None


def _soup_shares(parameters: SoupParameters, weights: Sequence[float]) -> list[float]:
    total = sum(weights) + parameters.base_weight
    return [weight / total for weight in weights]


@stage(
    "soup", "combine", SoupParameters, objection=_soup_objection,
    compiled=lambda given, weights: Sum(_soup_shares(given, list(weights.values()))),
)  # fmt: skip
def soup(deltas: list[Tensor], parameters: SoupParameters, context: Context) -> Tensor:
    """Average the models, the base among them with a weight of its own: sum_t w_t tau_t / (sum_t w_t + w_0)."""
    return weighted_total(deltas, _soup_shares(parameters, context.weights))


def _ema_objection(parameters: EmaParameters, weights: Mapping[str, float]) -> str | None:
    if sum(ema_shares(parameters.beta, tuple(weights), tuple(weights.values()))) == 0:
        return "ema divides by the sum of the checkpoints' weights, which is 0"
    return None


def ema_shares(beta: float, names: Sequence[str], weights: Sequence[float]) -> list[float]:
    """w_k beta^(K-k) over their sum, k the place of the name among all, numbers in it by value; 0 if the sum is 0."""
    order = sorted(names, key=_natural)
    decayed = [
        weight * beta ** (len(order) - 1 - order.index(name)) for name, weight in zip(names, weights, strict=True)
    ]
    total = sum(decayed)
    return [one / total if total else 0.0 for one in decayed]


def _natural(name: str) -> list[tuple[bool, int, str, str]]:
    """Sort key that takes numbers by value, be they longer than Python would make numbers of."""
    parts = re.split(r"([0-9]+)", name)
    return [
        (False, len(part.lstrip("0")), part.lstrip("0"), part) if place % 2 else (True, 0, part, "")
        for place, part in enumerate(parts)
    ]


@stage(
    "ema", "combine", EmaParameters, objection=_ema_objection,
    compiled=lambda given, weights: Sum(ema_shares(given.beta, tuple(weights), tuple(weights.values()))),
)  # fmt: skip
def ema(deltas: list[Tensor], parameters: EmaParameters, context: Context) -> Tensor:
    """Exponential moving average over checkpoints k = 1..K of one run: weights in proportion to w_k beta^(K-k).

    The checkpoints are in the order of their names in the recipe, numbers by value: step900 comes before step1000.
    """
    return weighted_total(deltas, ema_shares(parameters.beta, context.experts, context.weights))


method(
    name="soup",
    summary="Several runs on the same task: average them, the base with a share of its own if it should be kept.",
    source="Wortsman et al., ICML 2022, arXiv:2203.05482",
    stages=Stages(combine=("soup", {})),
    formula="sum_t w_t tau_t / (sum_t w_t + w_0)",
    promises=Promises(neutral={"base_weight": 0.0}, identical="mean"),
)
method(
    name="ema",
    summary="Checkpoints of one run: average them, the latest most; smooths what the last steps happened to do.",
    source="Izmailov et al., UAI 2018, arXiv:1803.05407; LAWA, arXiv:2209.14981",
    stages=Stages(combine=("ema", {})),
    formula="sum_k beta^(K-k) tau_k / sum_k beta^(K-k)",
    promises=Promises(identical="mean"),
)
