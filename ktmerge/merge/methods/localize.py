"""Localize-and-Stitch without training: each expert's largest changes, stitched together."""

from __future__ import annotations

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.kernels.codes import STITCH
from ktmerge.merge.methods.elect import relative
from ktmerge.merge.program import Ruled
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive


@stage(
    "stitch", "combine", objection=positive,
    compiled=lambda _, weights: Ruled(STITCH, relative(list(weights.values()))),
)  # fmt: skip
def stitch(deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    """Per element, the weighted mean of the deltas that are not zero (arXiv:2408.13656).

    sum_t m_t w_t tau_t / sum_t m_t w_t with m_t = [tau_t != 0]; an element that no expert changes stays the base's.
    """
    import torch

    weights = relative(context.weights)
    share = weighted_total([(delta != 0).float() for delta in deltas], weights)
    return torch.where(share > 0, weighted_total(deltas, weights) / share, 0.0)


method(
    name="localize_stitch",
    summary="Several experts and no data: a few per cent of each one's changes, averaged only where they meet.",
    source="He et al., 2024, arXiv:2408.13656, dataless",
    stages=Stages(transform=(("trim", {"density": 0.05, "scope": "global"}),), combine=("stitch", {})),
    formula="sum_t m_t tau_t / max(1, sum_t m_t), m_t = the d n largest |tau_t| of the whole model",
    cost="N oi, radix select",
    promises=Promises(neutral={"density": 1.0}, identical="mean"),
)
