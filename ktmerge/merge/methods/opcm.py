"""OPCM: experts one after the other, each without what the merge so far already holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, OnePass, Parameters, Promises, SplitFused, Stages, Statistic, Tensor


class OpcmParameters(Parameters):
    alpha: float = Field(
        0.5, ge=0, le=1, description="share of the singular values' sum whose directions are closed to later experts"
    )
    scope: Literal["tensor", "global"] = Field(
        "global", description="bring each tensor, or all of them together, to the experts' mean norm"
    )
    split_fused: SplitFused = True


@dataclass(frozen=True)
class Normed:
    """What a merge is multiplied by: mean_t ||tau_t|| / ||M||; and the merge, if it is of this tensor alone."""

    ratio: float
    merged: Tensor | None


class _NormRatio(OnePass):
    """Observer of the ratio, from exact sums of squares."""

    def __init__(self, parameters: OpcmParameters) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        self._parameters = parameters
        self._merged = ExactSum(2)
        self._last: Tensor | None = None
        self._experts: list[ExactSum] = []

    def observe(self, values: list[Tensor], context: Context) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        self._experts = self._experts or [ExactSum(2) for _ in values]
        for square, delta in zip(self._experts, values, strict=True):
            square.add(delta)
        merged = _added(values, self._parameters, context)
        self._merged.add(merged)
        self._last = merged if self._parameters.scope == "tensor" else None

    def result(self) -> Normed:
        norms = [math.sqrt(one.value()) for one in self._experts]
        moved = [norm for norm in norms if norm > 0]
        merged = math.sqrt(self._merged.value())
        ratio = 1.0 if len(moved) < 2 or not merged else sum(moved) / len(moved) / merged
        return Normed(ratio, self._last)


def _objection(parameters: OpcmParameters, weights: Mapping[str, float]) -> str | None:
    if len(set(weights.values())) > 1:
        return "opcm knows no expert weights, only their order (by name); give all experts the same"
    return None


@stage(
    "opcm", "combine", OpcmParameters, reach="tensor", objection=_objection,
    statistics=lambda given: [Statistic("ratio", given.scope, lambda _: _NormRatio(given))],
)  # fmt: skip
def opcm(deltas: list[Tensor], parameters: OpcmParameters, context: Context) -> Tensor:
    """Add expert after expert, by name, outside the merge's own directions; then the mean norm (arXiv:2501.09522).

    M <- M + tau_t - U (D * U^T tau_t V) V^T with M = U S V^T so far and D the upper left r x r block and the diagonal,
    r the fewest directions that hold ``alpha`` of the sum of singular values. Last, M times mean_t |tau_t| / |M|, both
    over all matrices or within each (the paper does so after every expert, which comes to the same, as neither U, V nor
    r depends on the length of M). Directions whose singular value is rounding are open. Tensors that are no linear maps
    are averaged.

    Norms are the mean of the experts that moved anything. The formula has no weights: they have to be equal.
    """
    found: Normed = context.statistics["ratio"]
    merged = _added(deltas, parameters, context) if found.merged is None else found.merged
    return merged if found.ratio == 1 else merged * found.ratio


def _added(deltas: list[Tensor], parameters: OpcmParameters, context: Context) -> Tensor:
    """M before its norm is set."""
    from ktmerge.merge.matrices import by_map

    def merge(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        return _added_maps(maps, base, parameters.alpha)

    return by_map(deltas, context, merge, fused=parameters.split_fused)


def _added_maps(maps: list[Tensor], base: Tensor, alpha: float) -> Tensor:
    import torch

    from ktmerge.merge.matrices import changed
    from ktmerge.merge.spectra import one_sided

    own = [maps[number] for number in changed(maps, base)]
    if len(own) < 2:
        return own[0] if own else torch.zeros_like(base)
    merged = own[0].double()
    for delta in own[1:]:
        found = one_sided(merged)
        values = found.values[: found.above()]
        held = found.inner(delta.double(), values.numel())
        rank = int((values.cumsum(0) < alpha * values.sum()).sum()) + 1 if alpha > 0 else 0
        closed = torch.eye(values.numel(), dtype=torch.bool, device=held.device)
        closed[:rank, :rank] = True
        merged = (merged + delta).sub_(found.outer(torch.where(closed, held, 0.0)))
    return merged.float()


method(
    name="opcm",
    summary="Experts that arrive over time, by name: each adds what lies outside the merge of those before it.",
    source="Tang et al., 2025, arXiv:2501.09522",
    stages=Stages(combine=("opcm", {})),
    otherwise=MEANS,
    formula="M <- M + tau_t - U (D * U^T tau_t V) V^T, M = U S V^T; then M mean_t |tau_t| / |M|",
    cost="N eigh m^3, twice; scope tensor: once",
    promises=Promises(identical="other", experts=False, elements=False, rotations=True, tolerance=1e-5),
)
