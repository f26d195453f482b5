"""Weighted sum of the deltas (task arithmetic)."""

from __future__ import annotations

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor


@stage("sum", "combine", compiled=lambda _, weights: Sum(list(weights.values())))
def weighted_sum(deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    """Weighted sum of the deltas: M = sum_t w_t tau_t."""
    return weighted_total(deltas, context.weights)


method(
    name="task_arithmetic",
    summary="Add what several experts learned; a negative weight takes a skill away.",
    formula="sum_t w_t tau_t",
    source="Ilharco et al., ICLR 2023, arXiv:2212.04089",
    stages=Stages(combine=("sum", {})),
    lambda_=0.3,
    promises=Promises(identical="sum"),
)
