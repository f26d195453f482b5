"""PCB-Merging: keep the parameters that matter to a task and on which tasks do not compete."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field

from ktmerge.merge.arithmetic import VECTORS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.weights import any_weight, relative, used


class PcbParameters(Parameters):
    density: float = Field(0.1, ge=0, le=1, description="fraction of each expert's elements, by score, that has a say")
    tail: float = Field(0.01, ge=0, lt=0.5, description="share at either end of the magnitudes that is clipped")
    scope: Literal["tensor", "global"] = Field("global", description="ranks of each tensor, or of the whole model")


@dataclass(frozen=True)
class _Levels:
    """Per expert: the magnitudes that become 0 and 1, and the scores that do."""

    magnitudes: list[tuple[float, float]]
    scores: list[tuple[float, float]]


class _Balance:
    """Observer of the levels: quantiles of magnitudes first, then, known these, of scores and the largest score."""

    def __init__(self, parameters: PcbParameters, elements: int) -> None:
        self._parameters, self._elements = parameters, elements
        self._ranked: list[Any] = []
        self._magnitudes: list[tuple[float, float]] = []
        self._largest: list[float] = []
        self.done = False

    def observe(self, values: list[Tensor], context: Context) -> None:
        if not values[0].numel():
            return
        values = used(values, context.weights)
        if not self._ranked:
            self._start(len(values))
        shown = _scores(values, self._magnitudes) if self._magnitudes else values
        for ranked, one in zip(self._ranked, shown, strict=True):
            ranked.add(one)
        if self._magnitudes:
            self._largest = [max(a, float(one.max())) for a, one in zip(self._largest, shown, strict=True)]

    def end_pass(self) -> None:
        for ranked in self._ranked:
            ranked.end_pass()
        if not all(ranked.done for ranked in self._ranked):
            return
        if self._magnitudes or not self._ranked:
            self.done = True
            return
        self._magnitudes = [(ranked.values[0], ranked.values[1]) for ranked in self._ranked]
        self._start(len(self._ranked))

    def result(self) -> _Levels:
        floors = [ranked.values[0] for ranked in self._ranked] if self._magnitudes else []
        return _Levels(self._magnitudes, list(zip(floors, self._largest, strict=False)))

    def _start(self, experts: int) -> None:
        from ktmerge.merge.quantiles import RankedMagnitudes
        from ktmerge.merge.ranking import quantile_rank

        tail, density = self._parameters.tail, self._parameters.density
        shares = [1 - density] if self._magnitudes else [tail, 1 - tail]
        ranks = [quantile_rank(share, self._elements) for share in shares]
        self._ranked = [RankedMagnitudes(ranks) for _ in range(experts)]
        self._largest = [0.0] * experts


@stage(
    "balance", "combine", PcbParameters, objection=any_weight, grain=lambda *_: VECTORS, portable=False,
    statistics=lambda given: [Statistic("levels", given.scope, partial(_Balance, given))],
)  # fmt: skip
def balance(deltas: list[Tensor], parameters: PcbParameters, context: Context) -> Tensor:
    """Mean of the deltas by how much each matters and how little others object (arXiv:2410.02396).

    With a_t = |tau_t| between its quantiles ``tail`` and 1 - ``tail``, scaled to 0 .. 1, and s_t = sign(tau_t) a_t:
    score_t = exp(N a_t^2) tanh(s_t sum_k s_k); g_t = score_t between its quantile 1 - density and its largest value,
    scaled to 0 .. 1; M = sum_t w_t tau_t g_t / sum_t g_t. Negative scores (outvoted elements) have no say. N counts the
    experts that changed anything, and w_t is relative to the mean weight. One expert alone gives its top elements.
    Differs from the published scripts, which differ from one another: magnitudes are scaled by quantiles, not by
    the largest value, and tanh takes scaled deltas, so that the result does not hang on outliers or on their unit.
    """
    import torch

    levels: _Levels = context.statistics["levels"]
    if not levels.scores or parameters.density == 0:
        return torch.zeros_like(deltas[0])
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    share = torch.zeros_like(total)
    members, weights = used(deltas, context.weights), relative(used(context.weights, context.weights))
    scores = _scores(members, levels.magnitudes)
    for delta, score, (low, high), weight in zip(members, scores, levels.scores, weights, strict=True):
        grade = _scaled(score.double(), low, high)
        total += delta.double() * weight * grade
        share += grade
    return torch.where(share > 0, total / share, 0.0).float()


def _scores(deltas: list[Tensor], magnitudes: list[tuple[float, float]]) -> list[Tensor]:
    """exp(N a^2) tanh(s sum_k s_k) of each expert, at least 0; fp32 from fp64."""
    import torch

    scaled = [
        torch.sign(delta.double()) * _scaled(delta.double().abs(), low, high)
        for delta, (low, high) in zip(deltas, magnitudes, strict=True)
    ]
    number = sum(high > 0 for _, high in magnitudes)
    together = torch.zeros_like(scaled[0])
    for one in scaled:
        together += one
    return [(torch.exp(number * one.square()) * torch.tanh(one * together)).clamp(min=0).float() for one in scaled]


def _scaled(values: Tensor, low: float, high: float) -> Tensor:
    """``low`` and below to 0, ``high`` and above to 1; if they are the same, what reaches it and is not 0 to 1."""
    if high > low:
        return ((values - low) / (high - low)).clamp(0, 1)
    return ((values >= high) & (values > 0)).double()


method(
    name="pcb",
    summary="Several experts: weigh every change by its size and by how far the others go along; mute the rest.",
    source="Du et al., NeurIPS 2024, arXiv:2410.02396",
    stages=Stages(combine=("balance", {})),
    lambda_=1.2,
    formula="sum_t tau_t g_t / sum_t g_t, g_t = top d of exp(N a_t^2) tanh(s_t sum_k s_k)",
    cost="N oi, four passes",
    promises=Promises(neutral=None, identical="other"),
    semantics=2,
)
