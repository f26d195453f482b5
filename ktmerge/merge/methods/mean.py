"""Weighted mean of the deltas: model averaging, and WiSE-FT with one expert."""

from __future__ import annotations

from collections.abc import Mapping

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Sum
from ktmerge.merge.registry import stage
from ktmerge.merge.stage import Context, Parameters, Tensor
from ktmerge.merge.weights import shares


def _sum_is_not_zero(parameters: Parameters, weights: Mapping[str, float]) -> str | None:
    if sum(weights.values()) == 0:
        return "a weighted mean divides by the sum of the expert weights, which is 0; use task_arithmetic to subtract"
    return None


@stage("mean", "combine", objection=_sum_is_not_zero, compiled=lambda _, weights: Sum(shares(weights.values())))
def mean(deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    """Weighted mean of the deltas: M = sum_t w_t tau_t / sum_t w_t."""
    return weighted_total(deltas, shares(context.weights))
