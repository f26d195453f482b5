"""Weighted sum of the deltas (task arithmetic)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Method, Parameters, Promises, Stages

if TYPE_CHECKING:
    from torch import Tensor


def _compiled(parameters: Parameters, weights: Mapping[str, float]) -> Sum:
    return Sum(list(weights.values()))


@stage("sum", "combine", compiled=_compiled)
def weighted_sum(deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    """Weighted sum of the deltas: M = sum_t w_t tau_t."""
    return weighted_total(deltas, context.weights)


method(
    Method(
        name="task_arithmetic",
        summary="Add what several experts learned; a negative weight takes a skill away.",
        formula="sum_t w_t tau_t",
        source="Ilharco et al., ICLR 2023, arXiv:2212.04089",
        stages=Stages(combine=("sum", {})),
        lambda_=0.3,
        promises=Promises(identical="sum"),
    )
)
