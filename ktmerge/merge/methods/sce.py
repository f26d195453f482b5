"""SCE: select where experts differ most, calculate their weights, erase minority signs."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field

from ktmerge.merge.arithmetic import quotient, weighted_total
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.methods.elect import disjoint, relative
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.weights import positive, used


class SceParameters(Parameters):
    select_topk: float = Field(
        0.1,
        ge=0,
        le=1,
        description="fraction kept of the elements in which experts differ at all; 1 keeps every element",
    )
    mask_deltas: bool = Field(True, description="merge the selected elements only; false: they only set the weights")
    tie: Literal["zero", "plus"] = Field("zero", description="when the deltas sum to 0: drop the element, or plus")


class _Selection:
    """Observer of the threshold of the selection and of each expert's energy in it."""

    def __init__(self, select_topk: float, elements: int) -> None:
        self._share, self._elements = select_topk, elements
        self._nonzero = 0
        self._search: Any = None
        self._threshold: Any = None
        self._energies: list[Any] = []
        self._phase = "count" if select_topk < 1 else "sum"
        self.done = False

    def observe(self, values: list[Tensor], context: Context) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        values = used(values, context.weights)
        if self._phase == "count":
            self._nonzero += int(_spread(values).count_nonzero())
        elif self._phase == "search":
            self._search.observe(_spread(values), context)
        else:
            self._energies = self._energies or [ExactSum(2) for _ in values]
            for energy, delta in zip(self._energies, _masked(values, self._threshold, context), strict=True):
                energy.add(delta)

    def end_pass(self) -> None:
        from ktmerge.merge.kernels.radix import MagnitudeThreshold

        if self._phase == "sum":
            self.done = True
        elif self._phase == "count":
            self._search = MagnitudeThreshold(int(self._share * self._nonzero), self._elements, _hash_key)
            self._phase = "search"
        else:
            self._search.end_pass()
        if self._phase == "search" and self._search.done:
            self._threshold, self._phase = self._search.result(), "sum"

    def result(self) -> tuple[Any, list[float]]:
        energies = [one.value() for one in self._energies]
        total = sum(energies)
        return self._threshold, [float(one / total) if total else 0.0 for one in energies]


@stage(
    "sce", "combine", SceParameters, objection=positive,
    statistics=lambda given: [Statistic("selection", "tensor", partial(_Selection, given.select_topk))],
)  # fmt: skip
def sce(deltas: list[Tensor], parameters: SceParameters, context: Context) -> Tensor:
    """Select, calculate, erase (arXiv:2408.07990): sum_A w_t tau_t / sum_A w_t over the majority's sign.

    Selected are the k = floor(select_topk n) of the n elements of non-zero variance over the experts whose variance is
    largest, equals decided by a hash; w_t is the share of expert t in the sum of squares of what is selected, times its
    expert weight; A are the experts that have the sign of sum_t tau_t. Below 1, experts that are all the same select
    nothing, and one expert alone gives the base; with mask_deltas false all count by their expert weights there.
    Differs from mergekit where the sum of weights is below 1e-6, which it divides by instead, where the mean squares of
    the deltas sum to less than that, which it gives equal weights, and where the deltas sum to 0, which it counts as
    plus. mask_deltas false is the authors' fork, which merges what was not selected, too.
    """
    import torch

    if not deltas[0].numel():
        return deltas[0].clone()
    threshold, energies = context.statistics["selection"]
    deltas, shares = used(deltas, context.weights), used(context.weights, context.weights)
    weights = [energy * weight for energy, weight in zip(energies, shares, strict=True)]
    if not any(weights):
        weights = shares
    selected = _masked(deltas, threshold, context) if parameters.mask_deltas else deltas
    sign = torch.sign(weighted_total(selected, [1.0] * len(selected)))
    if parameters.tie == "plus":
        sign = torch.where(sign == 0, 1.0, sign)
    return disjoint(selected, sign, "wmean", relative(weights))


def _hash_key(context: Context) -> int:
    return stream_key(context.seed, "sce", "", context.tensor)


def _masked(deltas: list[Tensor], threshold: Any, context: Context) -> list[Tensor]:
    """The deltas with zeros wherever nothing is selected; without a threshold all is."""
    import torch

    if threshold is None:
        return deltas
    kept = context.kernels.keep(_spread(deltas), _hash_key(context), context.start, threshold) != 0
    return [torch.where(kept, delta, 0.0) for delta in deltas]


def _spread(deltas: list[Tensor]) -> Tensor:
    """Standard deviation over the experts; it orders as the variance does and does not underflow. fp32 from fp64."""
    exact = [delta.double() for delta in deltas]
    mean = quotient(weighted_total(exact, [1.0] * len(exact)), len(exact))
    squares = [(one - mean).square() for one in exact]
    return quotient(weighted_total(squares, [1.0] * len(squares)), len(squares)).sqrt().float()


method(
    name="sce",
    summary="Several experts: merge only where they differ most, each weighted by how much it changed there.",
    source="Wan et al., 2024, arXiv:2408.07990",
    stages=Stages(combine=("sce", {})),
    formula="sum_A w_t tau_t / sum_A w_t, w_t ~ |m tau_t|^2, m = top k of the variance, A = {t: sign of the sum}",
    cost="N oi, radix select",
    promises=Promises(neutral={"select_topk": 1.0}, identical="mean", elements=False, nothing={"select_topk": 0.0}),
    semantics=2,
)
