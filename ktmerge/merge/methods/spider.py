"""SPIDER after training: keep changes that stand out among the changes more than their weights do among the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Method, Parameters, Promises, Stages

if TYPE_CHECKING:
    from torch import Tensor


class SpiderParameters(Parameters):
    kappa: float = Field(0.0, ge=-1, le=1, description="how much more a change has to stand out to be kept")


@stage("spider", "transform", SpiderParameters, reach="tensor")
def spider(delta: Tensor, parameters: SpiderParameters, context: Context) -> Tensor:
    """Keep tau times c = r_t / (r_0 + r_t) where r_t > r_0 + kappa (arXiv:2411.10928, eq. 4-7, with tau as the update).

    r_0 = sigmoid(z(|theta_0|)), r_t = sigmoid(z(|tau|)), z standardised over the tensor (0 if all are equal); c is
    divided by the mean of its values that are not 0, and capped at 1. Untouched elements stay the base's.
    """
    import torch

    from ktmerge.merge.kernels.sums import ExactSum

    pretrained, tuned = (torch.sigmoid(_standardised(values)) for values in (context.base, delta))
    share = torch.where((tuned > pretrained + parameters.kappa) & (delta != 0), tuned / (pretrained + tuned), 0).float()
    chosen = int(share.count_nonzero())
    if not chosen:
        return torch.zeros_like(delta)
    total = ExactSum(1)
    total.add(share)
    return delta * (share / float(total.value() / chosen)).clamp(max=1)


def _standardised(values: Tensor) -> Tensor:
    """(|x| - mean) / standard deviation, float64, from exact sums; 0 where all magnitudes are equal."""
    import torch

    from ktmerge.merge.kernels.sums import ExactSum

    magnitudes = values.abs().double()
    first, second = ExactSum(1), ExactSum(2)
    first.add(values)
    second.add(values)
    mean = first.value() / max(1, values.numel())
    variance = second.value() / max(1, values.numel()) - mean * mean
    return (magnitudes - float(mean)) / float(variance) ** 0.5 if variance else torch.zeros_like(magnitudes)


method(
    Method(
        name="spider",
        summary="One expert, nothing to tune: keep changes that are large where the base's own weights are small.",
        source="Huang et al., ICML 2025, arXiv:2411.10928, applied after training",
        stages=Stages(transform=(("spider", {}),), combine=("sum", {})),
        experts=(1, 1),
        formula="min(1, c / mean c) tau, c = r_t / (r_0 + r_t) where r_t > r_0 + kappa, r = sigmoid(z(|.|))",
        promises=Promises(neutral=None, identical="other"),
    )
)
