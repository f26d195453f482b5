"""Weighted mean of the deltas: model averaging, and WiSE-FT with one expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Sum
from ktmerge.merge.registry import stage
from ktmerge.merge.stage import Context, Parameters

if TYPE_CHECKING:
    from torch import Tensor


def _sum_is_not_zero(parameters: Parameters, weights: Mapping[str, float]) -> str | None:
    if sum(weights.values()) == 0:
        return "a weighted mean divides by the sum of the expert weights, which is 0; use task_arithmetic to subtract"
    return None


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def _compiled(parameters: Parameters, weights: Mapping[str, float]) -> Sum:
    return Sum(_shares(list(weights.values())))


@stage("mean", "combine", objection=_sum_is_not_zero, compiled=_compiled)
def mean(deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    """Weighted mean of the deltas: M = sum_t w_t tau_t / sum_t w_t."""
    return weighted_total(deltas, _shares(context.weights))
