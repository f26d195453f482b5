"""Weighing each changed element by what upstream and downstream data have to say about it: CGM, and a plain vote."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.methods.fisher import BOTH, information
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Method, Need, Parameters, Promises, Stages

if TYPE_CHECKING:
    from torch import Tensor


class CgmParameters(Parameters):
    alpha: float = Field(0.1, ge=0, description="how much upstream information counts; 0 keeps the tuned model")
    norm: Literal["none", "global"] = Field(
        "none", description="take Fisher information as it is, or divide it by its norm over all tensors of the model"
    )


class CgmHardParameters(CgmParameters):
    density: float = Field(0.9, ge=0, le=1, description="fraction of each tensor's elements that is kept, exactly")


class GuardedParameters(Parameters):
    kappa: float = Field(
        0.0, ge=-0.5, le=0.5, description="keep where downstream has more than 1/2 + kappa of the information"
    )


def _needs(parameters: Parameters) -> tuple[Need, ...]:
    return BOTH


@stage("cgm", "transform", CgmParameters, needs=_needs)
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


@stage("cgm_hard", "transform", CgmHardParameters, reach="tensor", needs=_needs)
def cgm_hard(delta: Tensor, parameters: CgmHardParameters, context: Context) -> Tensor:
    """Put the elements with the smallest (h_d - alpha h_u) tau^2 back to the base (CGM hard).

    The score is the gain downstream less alpha times the loss upstream, to second order. floor(density n) elements of
    each tensor stay as they are; equal scores at the edge are decided by a hash of (seed, expert, tensor, element).
    """
    import torch

    from ktmerge.merge.ranking import largest

    count = math.floor(parameters.density * delta.numel())
    if count == delta.numel():
        return delta
    gain = information(context, context.expert, parameters.norm, 0.0)
    loss = parameters.alpha * information(context, "", parameters.norm, 0.0)
    key = stream_key(context.seed, "cgm_hard", context.expert, context.tensor)
    return torch.where(largest((gain - loss) * delta.double() ** 2, count, key), delta, 0.0)


@stage("guarded", "transform", GuardedParameters, needs=_needs)
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
    Method(
        name="cgm",
        summary="Gradients on data of both sides: pull each element to the base as far as upstream data needs it.",
        source=_SOURCE,
        stages=Stages(transform=(("cgm", {}),), combine=("mean", {})),
        formula="tau h_d / (h_d + alpha h_u), mean over experts",
        promises=Promises(neutral={"alpha": 0.0}, identical="mean", elements=False, tolerance=1e-6),
    )
)
method(
    Method(
        name="cgm_hard",
        summary="As cgm, but the elements that cost upstream most go back to the base whole, and the others stay.",
        source=_SOURCE,
        stages=Stages(transform=(("cgm_hard", {}),), combine=("mean", {})),
        formula="tau where (h_d - alpha h_u) tau^2 is among the largest density n, else 0; mean over experts",
        cost="N oi log oi",
        promises=Promises(neutral={"density": 1.0}, identical="mean", elements=False, tolerance=1e-6),
    )
)
method(
    Method(
        name="guarded",
        summary="Gradients on data of both sides: keep only the elements that downstream data needs more.",
        source="ktmerge; information as in arXiv:2111.09832",
        stages=Stages(transform=(("guarded", {}),), combine=("mean", {})),
        formula="tau where F_d / (F_d + F_u) >= 1/2 + kappa, else 0; mean over experts",
        promises=Promises(neutral={"kappa": -0.5}, identical="mean", elements=False, tolerance=1e-6),
    )
)
