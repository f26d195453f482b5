"""MagMax: per element, the largest change."""

from __future__ import annotations

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Largest
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import any_weight, relative


@stage(
    "largest", "combine", objection=any_weight,
    compiled=lambda _, weights: Largest(relative(list(weights.values()))),
)  # fmt: skip
def largest(deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    """Per element, the delta of largest magnitude: tau_t*, t* = argmax_t |tau_t| (arXiv:2407.06322).

    Between +m and -m, equally large, the sign of the sum of all deltas decides; if that is 0, nothing changes. Weights
    multiply the deltas, relative to the mean of their magnitudes.
    Differs from the published code, where the later expert wins, so that the order of the experts matters.
    """
    import torch

    weights = relative(context.weights)
    scaled = [delta if weight == 1 else delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    high, low = scaled[0], scaled[0]
    for delta in scaled[1:]:
        high, low = torch.maximum(high, delta), torch.minimum(low, delta)
    mass = torch.sign(weighted_total(scaled, [1.0] * len(scaled)))
    return torch.where(high > -low, high, torch.where(high < -low, low, high * mass))


method(
    name="magmax",
    summary="Experts fine-tuned one after another: of every weight, the largest change; no averaging.",
    source="Marczak et al., ECCV 2024, arXiv:2407.06322",
    stages=Stages(combine=("largest", {})),
    lambda_=0.5,
    formula="tau_t*, t* = argmax_t |tau_t|",
    promises=Promises(identical="mean"),
    semantics=2,
)
