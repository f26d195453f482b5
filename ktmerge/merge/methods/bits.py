"""BitDelta: one bit for each element's change, and one scale for each tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Method, OnePass, Parameters, Promises, Stages, Statistic

if TYPE_CHECKING:
    from torch import Tensor


class _MeanMagnitude(OnePass):
    """Observer of mean |tau| of one tensor, from an exact sum."""

    def __init__(self, elements: int) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        self._elements = elements
        self._sum = ExactSum(1)

    def observe(self, values: Tensor, context: Context) -> None:
        self._sum.add(values)

    def result(self) -> float:
        return float(self._sum.value() / max(1, self._elements))


def _mean(parameters: Parameters) -> tuple[Statistic, ...]:
    return (Statistic("mean", "tensor", lambda domain: _MeanMagnitude(domain.elements)),)


@stage("bitdelta", "transform", statistics=_mean)
def bitdelta(delta: Tensor, parameters: Parameters, context: Context) -> Tensor:
    """Replace every change by its sign times the tensor's mean magnitude (arXiv:2402.10193, eq. 1-2).

    Of all scales this has the least squared error. Differs from the paper where nothing changed: that stays the base's.
    """
    import torch

    mean: float = context.statistics["mean"]
    return torch.sign(delta) * mean


_SUM = Stages(combine=("sum", {}))

method(
    Method(
        name="bitdelta",
        summary="Check what one bit a weight keeps of an expert, e.g. to store many; not a means against forgetting.",
        source="Liu et al., NeurIPS 2024, arXiv:2402.10193",
        stages=Stages(transform=(("bitdelta", {}),), combine=("sum", {})),
        otherwise={"embed": _SUM, "vector": _SUM},
        formula="mean |tau| sign(tau)",
        promises=Promises(neutral=None, identical="other"),
        semantics=2,
    )
)
