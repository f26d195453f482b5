"""SPIDER after training: keep changes that stand out among the changes more than their weights do among the weights."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from ktmerge.merge.arithmetic import VECTORS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Statistic, Tensor


class SpiderParameters(Parameters):
    kappa: float = Field(0.0, ge=-1, le=1, description="how much more a change has to stand out to be kept")


class _Importance:
    """sigmoid((|x| - mean) / standard deviation), with those of a whole tensor from exact sums."""

    def __init__(self, elements: int) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        self._first, self._second = ExactSum(1), ExactSum(2)
        self._elements = max(1, elements)
        self._mean = self._deviation = 0.0

    def add(self, values: Tensor) -> None:
        self._first.add(values)
        self._second.add(values)

    def end(self) -> None:
        """All values were added."""
        mean = self._first.value() / self._elements
        self._mean = float(mean)
        self._deviation = float(self._second.value() / self._elements - mean * mean) ** 0.5

    def of(self, values: Tensor) -> Tensor:
        """Of some of the values, float64; 1/2 where all magnitudes are equal."""
        import torch

        magnitudes = values.abs().double()
        if not self._deviation:
            return torch.full_like(magnitudes, 0.5)
        return torch.sigmoid((magnitudes - self._mean) / self._deviation)


class _Shares:
    """What each element of a tensor keeps: an observer of what that takes to know."""

    def __init__(self, parameters: SpiderParameters, elements: int) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        self._kappa = parameters.kappa
        self._pretrained, self._tuned = _Importance(elements), _Importance(elements)
        self._total, self._chosen = ExactSum(1), 0
        self._ranked = self.done = False

    def observe(self, values: Tensor, context: Context) -> None:
        if not self._ranked:
            self._pretrained.add(context.base)
            self._tuned.add(values)
            return
        shares = self._shares(values, context.base)
        self._total.add(shares)
        self._chosen += int(shares.count_nonzero())

    def end_pass(self) -> None:
        if self._ranked:
            self.done = True
            return
        self._pretrained.end()
        self._tuned.end()
        self._ranked = True

    def result(self) -> _Shares:
        return self

    def of(self, delta: Tensor, base: Tensor) -> Tensor:
        """Of some of the elements, relative to the mean of those that keep any, fp32, at most 1."""
        shares = self._shares(delta, base)
        return shares.div_(float(self._total.value() / self._chosen)).clamp_(max=1) if self._chosen else shares

    def _shares(self, delta: Tensor, base: Tensor) -> Tensor:
        import torch

        before, after = self._pretrained.of(base), self._tuned.of(delta)
        return torch.where(after > before + self._kappa, after / (before + after), 0).float()


@stage(
    "spider", "transform", SpiderParameters, grain=lambda *_: VECTORS, portable=False,
    statistics=lambda given: [Statistic("shares", "tensor", partial(_Shares, given))],
)  # fmt: skip
def spider(delta: Tensor, parameters: SpiderParameters, context: Context) -> Tensor:
    """Keep tau times c = r_t / (r_0 + r_t) where r_t > r_0 + kappa (arXiv:2411.10928, eq. 4-7, with tau as the update).

    r_0 = sigmoid(z(|theta_0|)), r_t = sigmoid(z(|tau|)), z standardised over the tensor (0 if all are equal); c is
    divided by the mean of its values that are not 0, and capped at 1.
    """
    shares: _Shares = context.statistics["shares"]
    return shares.of(delta, context.base) * delta


method(
    name="spider",
    summary="One expert, nothing to tune: keep changes that are large where the base's own weights are small.",
    source="Huang et al., ICML 2025, arXiv:2411.10928, applied after training",
    stages=Stages(transform=(("spider", {}),), combine=("sum", {})),
    experts=(1, 1),
    formula="min(1, c / mean c) tau, c = r_t / (r_0 + r_t) where r_t > r_0 + kappa, r = sigmoid(z(|.|))",
    promises=Promises(neutral=None, identical="other"),
    semantics=2,
)
