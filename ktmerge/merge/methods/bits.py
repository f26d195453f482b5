"""BitDelta: one bit for each element's change, and one scale for each tensor."""

from __future__ import annotations

from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.summed import Summed


def _mean_magnitude(elements: int) -> Summed:
    return Summed(1, lambda delta, _: [delta], lambda _, total: float(total / max(1, elements)), 0.0)


@stage("bitdelta", "transform", statistics=lambda _: [Statistic("mean", "tensor", _mean_magnitude)])
def bitdelta(delta: Tensor, parameters: Parameters, context: Context) -> Tensor:
    """Replace every change by its sign times the tensor's mean magnitude (arXiv:2402.10193, eq. 1-2).

    Of all scales this has the least squared error. Differs from the paper where nothing changed: that stays the base's.
    """
    import torch

    mean: float = context.statistics["mean"]
    return torch.sign(delta) * mean


method(
    name="bitdelta",
    summary="Check what one bit a weight keeps of an expert, e.g. to store many; not a means against forgetting.",
    source="Liu et al., NeurIPS 2024, arXiv:2402.10193",
    stages=Stages(transform=(("bitdelta", {}),), combine=("sum", {})),
    otherwise=dict.fromkeys(("embed", "vector"), Stages(combine=("sum", {}))),
    formula="mean |tau| sign(tau)",
    promises=Promises(neutral=None, identical="other"),
    semantics=2,
)
