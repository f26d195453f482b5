"""Weighing each changed element by what upstream and downstream data have to say about it: CGM, and a plain vote."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.methods.fisher import BOTH, information
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Parameters, Promises, Stages, Statistic, Tensor

if TYPE_CHECKING:
    from ktmerge.merge.kernels.radix import MagnitudeThreshold
    from ktmerge.merge.kernels.search import Threshold


class CgmParameters(Parameters):
    alpha: Amount = Field(0.1, description="how much upstream information counts; 0 keeps the tuned model")
    norm: Literal["none", "global"] = Field(
        "none", description="take Fisher information as it is, or divide it by its norm over all tensors of the model"
    )


class CgmHardParameters(CgmParameters):
    density: float = Field(0.9, ge=0, le=1, description="fraction of the elements that is kept, exactly")
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="rank within each tensor, or among all elements of the expert"
    )


class GuardedParameters(Parameters):
    kappa: float = Field(
        0.0, ge=-0.5, le=0.5, description="keep where downstream has more than 1/2 + kappa of the information"
    )


@stage("cgm", "transform", CgmParameters, needs=lambda _: BOTH)
def cgm(delta: Tensor, parameters: CgmParameters, context: Context) -> Tensor:
    """tau h_d / (h_d + alpha h_u): pulled to the base by l = alpha h_u / (h_d + alpha h_u) (CGM soft).

    h is the diagonal of the Fisher information, of the tuned model downstream and of the base upstream. An element of
    which neither knows anything is kept.
    """
    import torch

    if parameters.alpha == 0:
        return delta
    down = information(context, context.expert, parameters.norm, 0.0)
    total = down + parameters.alpha * information(context, "", parameters.norm, 0.0)
    return torch.where(total > 0, delta * (down / total), delta.double()).float()


class _Edge:
    """Observer of where the kept scores end: which side of zero that is, and the threshold of magnitudes there.

    On side 1 the largest of the scores above 0 stay, on side -1 the largest of those below 0 go; on side 0 all above
    stay, and as many that are 0 as hashes decide.
    """

    def __init__(self, parameters: CgmHardParameters, elements: int) -> None:
        self._parameters = parameters
        self._elements = elements
        self._above, self._zero = 0, 0
        self._side = 0
        self._search: MagnitudeThreshold | None = None

    @property
    def done(self) -> bool:
        return self._search is not None and self._search.done

    def observe(self, values: Tensor, context: Context) -> None:
        scores = _scores(values, self._parameters, context)
        if self._search is None:
            self._above += int((scores > 0).sum())
            self._zero += int((scores == 0).sum())
        else:
            self._search.observe(_magnitudes(scores, self._side), context)

    def end_pass(self) -> None:
        from ktmerge.merge.kernels.radix import MagnitudeThreshold

        if self._search is not None:
            self._search.end_pass()
            return
        keep = math.floor(self._parameters.density * self._elements)
        self._side = 1 if keep <= self._above else -1 if keep >= self._above + self._zero else 0
        count = self._elements - keep if self._side < 0 else keep
        self._search = MagnitudeThreshold(count, self._elements, _key)

    def result(self) -> tuple[int, Threshold]:
        assert self._search is not None
        return self._side, self._search.result()


def _scores(delta: Tensor, parameters: CgmHardParameters, context: Context) -> Tensor:
    """Their roots, with their signs: products of small numbers leave the range of fp32."""
    gain = information(context, context.expert, parameters.norm, 0.0)
    loss = parameters.alpha * information(context, "", parameters.norm, 0.0)
    benefit = gain - loss
    return (benefit.sign() * benefit.abs().sqrt() * delta.double().abs()).float()


def _magnitudes(scores: Tensor, side: int) -> Tensor:
    return (scores * side).clamp(min=0) if side else scores.sign() + 1


def _key(context: Context) -> int:
    return stream_key(context.seed, "cgm_hard", context.expert, context.tensor)


@stage(
    "cgm_hard", "transform", CgmHardParameters, needs=lambda _: BOTH,
    statistics=lambda given: [Statistic("edge", given.scope, partial(_Edge, given))],
)  # fmt: skip
def cgm_hard(delta: Tensor, parameters: CgmHardParameters, context: Context) -> Tensor:
    """Put the elements with the smallest (h_d - alpha h_u) tau^2 back to the base (CGM hard).

    The score is the gain downstream less alpha times the loss upstream, to second order. floor(density n) elements stay
    as they are; equal scores at the edge are decided by a hash of (seed, expert, tensor, element).
    """
    import torch

    side, threshold = context.statistics["edge"]
    magnitudes = _magnitudes(_scores(delta, parameters, context), side)
    found = context.kernels.keep(magnitudes, _key(context), context.start, threshold) > 0
    return torch.where(found if side >= 0 else ~found, delta, 0.0)


@stage("guarded", "transform", GuardedParameters, needs=lambda _: BOTH)
def guarded(delta: Tensor, parameters: GuardedParameters, context: Context) -> Tensor:
    """Keep an element where F_d / (F_d + F_u) >= 1/2 + kappa, put the rest back to the base.

    Both are Fisher information over its norm in all of the model's tensors. An element of which neither knows anything
    is kept; kappa = -1/2 keeps all.
    """
    import torch

    down, up = information(context, context.expert, "global", 0.0), information(context, "", "global", 0.0)
    kept = down * (0.5 - parameters.kappa) >= up * (0.5 + parameters.kappa)
    return torch.where(kept, delta, 0.0)


_SOURCE = "CGM, ECCV 2026"

method(
    name="cgm",
    summary="Gradients on data of both sides: pull each element to the base as far as upstream data needs it.",
    source=_SOURCE,
    stages=Stages(transform=(("cgm", {}),), combine=("mean", {})),
    formula="tau h_d / (h_d + alpha h_u), mean over experts",
    promises=Promises(neutral={"alpha": 0.0}, identical="mean", elements=False, tolerance=1e-6),
)
method(
    name="cgm_hard",
    summary="As cgm, but the elements that cost upstream most go back to the base whole, and the others stay.",
    source=_SOURCE,
    stages=Stages(transform=(("cgm_hard", {}),), combine=("mean", {})),
    formula="tau where (h_d - alpha h_u) tau^2 is among the largest density n, else 0; mean over experts",
    promises=Promises(neutral={"density": 1.0}, identical="mean", elements=False, tolerance=1e-6),
    semantics=2,
)
method(
    name="guarded",
    summary="Gradients on data of both sides: keep only the elements that downstream data needs more.",
    source="ktmerge; information as in arXiv:2111.09832",
    stages=Stages(transform=(("guarded", {}),), combine=("mean", {})),
    formula="tau where F_d / (F_d + F_u) >= 1/2 + kappa, else 0; mean over experts",
    promises=Promises(neutral={"kappa": -0.5}, identical="mean", elements=False, tolerance=1e-6),
)
