"""RAM and RAM+: average only where experts overlap, and make up for it where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.kernels.codes import OVERLAP
from ktmerge.merge.program import Ruled
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, OnePass, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.weights import any_weight, relative

_EXPONENT_BITS = 0x7F800000
_BF16_STEP = 2.0**-7


class RamParameters(Parameters):
    epsilon: Amount = Field(
        0.5, description="smallest change that counts, in bf16 steps of the base's weight; 0 is any change"
    )


class RamPlusParameters(RamParameters):
    r: Amount = Field(0.1, description="how much more an expert's own changes count, per overlap")
    alpha: Amount = Field(0.2, description="largest overlap (shared over own changes) that counts")
    scope: Literal["tensor", "global"] = Field("global", description="overlap of each tensor, or of the whole model")


class _Overlap(OnePass):
    """Observer of each expert's factor 1 + r clip(shared / unique, 0, alpha), from counts."""

    def __init__(self, parameters: RamPlusParameters) -> None:
        self._parameters = parameters
        self._shared: list[int] = []
        self._unique: list[int] = []

    def observe(self, values: list[Tensor], context: Context) -> None:
        active = _active(values, self._parameters, context)
        number = weighted_total([one.float() for one in active], [1.0] * len(active))
        self._shared = self._shared or [0] * len(active)
        self._unique = self._unique or [0] * len(active)
        for expert, one in enumerate(active):
            unique = int((one & (number == 1)).sum())
            self._unique[expert] += unique
            self._shared[expert] += int(one.sum()) - unique

    def result(self) -> list[float]:
        return _factors(self._parameters, self._shared, self._unique)


def _factors(parameters: RamPlusParameters, shared: Sequence[int], unique: Sequence[int]) -> list[float]:
    """1 + r clip(shared / unique, 0, alpha) of each expert."""
    # without unique changes the factor concerns nothing; the count of 1 keeps it finite
    pairs = zip(shared, unique, strict=True)
    return [1 + parameters.r * min(parameters.alpha, others / max(own, 1)) for others, own in pairs]


def _ruled(parameters: RamParameters, weights: Mapping[str, float]) -> Ruled | None:
    if not all(weights.values()):
        return None  # the kernel knows no expert that does not count
    return Ruled(OVERLAP, relative(list(weights.values())), (parameters.epsilon * _BF16_STEP,))


def _ruled_plus(parameters: RamPlusParameters, weights: Mapping[str, float]) -> Ruled | None:
    plain = _ruled(parameters, weights)
    if plain is None:
        return None

    def with_factors(shared: Sequence[int], unique: Sequence[int]) -> Ruled:
        return replace(plain, factors=_factors(parameters, shared, unique))

    return replace(plain, asks="overlap", scope=parameters.scope, answer=with_factors)


@stage("overlap_mean", "combine", RamParameters, objection=any_weight, compiled=_ruled)
def overlap_mean(deltas: list[Tensor], parameters: RamParameters, context: Context) -> Tensor:
    """Per element, the mean of the experts that change it: sum_A tau_t / |A|, A = {t: |tau_t| >= e} (arXiv:2601.13572).

    e is half a bf16 step of |theta_0| (2^-8 of its power of two), below which a change is rounding. Weights multiply
    the deltas, relative to the mean of their magnitudes.
    Differs from mergekit, whose e is 1e-5 whatever the size and type of the weights.
    """
    return _merged(deltas, [1.0] * len(deltas), parameters, context)


@stage(
    "overlap_plus", "combine", RamPlusParameters, objection=any_weight, compiled=_ruled_plus,
    statistics=lambda given: [Statistic("factors", given.scope, lambda _: _Overlap(given))],
)  # fmt: skip
def overlap_plus(deltas: list[Tensor], parameters: RamPlusParameters, context: Context) -> Tensor:
    """As overlap_mean, with an expert's own changes times 1 + r clip(shared / own, 0, alpha) (arXiv:2601.13572).

    shared / own: how many of the expert's changes others share, over how many they do not.
    Differs from mergekit's ramplus_tl, which counts within each tensor, as scope tensor does.
    """
    return _merged(deltas, context.statistics["factors"], parameters, context)


def _merged(deltas: list[Tensor], factors: list[float], parameters: RamParameters, context: Context) -> Tensor:
    import torch

    active = _active(deltas, parameters, context)
    number = weighted_total([one.float() for one in active], [1.0] * len(active))
    total = torch.zeros_like(deltas[0])
    for delta, one, weight, factor in zip(deltas, active, relative(context.weights), factors, strict=True):
        own = delta if weight == 1 else delta * weight
        total += torch.where(one, torch.where(number == 1, own * factor, own), 0.0)
    return torch.where(number > 1, total / number, total)


def _active(deltas: list[Tensor], parameters: RamParameters, context: Context) -> list[Tensor]:
    """Where each expert's change counts; nowhere if it has no weight."""
    import torch

    power_of_two = (context.base.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    floor = parameters.epsilon * _BF16_STEP * power_of_two
    pairs = zip(deltas, context.weights, strict=True)
    return [(delta.abs() >= floor) & (delta != 0) if weight else torch.zeros_like(delta) > 0 for delta, weight in pairs]


method(
    name="ram",
    summary="Experts trained by reinforcement, with sparse changes: add what is one's own, average what is shared.",
    source="Reinforced Agent Merging, 2026, arXiv:2601.13572",
    stages=Stages(combine=("overlap_mean", {})),
    formula="sum_A tau_t / |A|, A = {t: |tau_t| >= e}",
    promises=Promises(neutral={"epsilon": 0.0}, identical="mean", scale=False),
    semantics=2,
)
method(
    name="ram_plus",
    summary="As ram, with what is one's own a little enlarged, to make up for what averaging took.",
    source="Reinforced Agent Merging, 2026, arXiv:2601.13572",
    stages=Stages(combine=("overlap_plus", {})),
    formula="as ram, tau_t (1 + r clip(shared_t / own_t, 0, alpha)) where |A| = 1",
    promises=Promises(neutral={"epsilon": 0.0}, identical="mean", scale=False),
    semantics=2,
)
