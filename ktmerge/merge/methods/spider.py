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
    from ktmerge.merge.rows import pieces

    pretrained, tuned = _Importance(context.base), _Importance(delta)
    total, chosen, kept_part = ExactSum(1), 0, torch.empty_like(delta)
    for weights, changes, share in zip(*map(pieces, (context.base, delta, kept_part)), strict=True):
        before, after = pretrained.of(weights), tuned.of(changes)
        kept = (after > before + parameters.kappa) & (changes != 0)
        share.copy_(torch.where(kept, after / (before + after), 0))
        total.add(share)
        chosen += int(kept.count_nonzero())
    if not chosen:
        return torch.zeros_like(delta)
    return kept_part.div_(float(total.value() / chosen)).clamp_(max=1).mul_(delta)


class _Importance:
    """sigmoid((|x| - mean) / standard deviation) with those of a whole tensor, from exact sums."""

    def __init__(self, values: Tensor) -> None:
        from ktmerge.merge.kernels.sums import ExactSum
        from ktmerge.merge.rows import pieces

        first, second = ExactSum(1), ExactSum(2)
        for piece in pieces(values):
            first.add(piece)
            second.add(piece)
        mean = first.value() / max(1, values.numel())
        variance = second.value() / max(1, values.numel()) - mean * mean
        self._mean, self._deviation = float(mean), float(variance) ** 0.5

    def of(self, values: Tensor) -> Tensor:
        """Of some of the values, float64; 1/2 where all magnitudes are equal."""
        import torch

        magnitudes = values.abs().double()
        if not self._deviation:
            return torch.full_like(magnitudes, 0.5)
        return torch.sigmoid((magnitudes - self._mean) / self._deviation)


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
