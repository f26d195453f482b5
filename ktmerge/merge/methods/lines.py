"""LiNeS: shallow layers go further back to the base than deep ones."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from pydantic import Field

from ktmerge.merge.program import Ramp
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.summed import Summed
from ktmerge.merge.weights import used
from ktmerge.recipes.schema import Factor


class LinesParameters(Parameters):
    alpha: Factor | Literal["auto"] = Field(
        0.5,
        description="scale of the first layer; auto: what gives the merge the L1 norm of the sum of N experts, over N",
    )
    beta: Factor | None = Field(None, description="what the last layer gets on top; if not given 1 - alpha")
    outside: Literal["alpha", "alpha+beta"] = Field(
        "alpha", description="scale of what is in no layer: embeddings, the final norm, the head, connectors"
    )


def _ramp(parameters: LinesParameters, alpha: float) -> Ramp:
    beta = 1 - alpha if parameters.beta is None else parameters.beta
    return Ramp(alpha, beta, float(parameters.outside == "alpha+beta"))


def _total_and_merged(merged: Tensor, context: Context) -> Sequence[Tensor]:
    from ktmerge.merge.arithmetic import weighted_total

    members = used(context.deltas, context.weights)
    return [weighted_total(members, [1.0] * len(members)) if members else 0 * merged, merged]


def _share(weights: Sequence[float], total: Fraction, merged: Fraction) -> float:
    """(||sum_t tau_t||_1 / ||M||_1) / N."""
    return float(total / merged / len(used(weights, weights))) if merged else 1.0


def _statistics(parameters: LinesParameters) -> tuple[Statistic, ...]:
    if parameters.alpha != "auto":
        return ()
    return (Statistic("alpha", "global", lambda elements: Summed(1, _total_and_merged, _share, 1.0)),)


@stage(
    "lines", "scale", LinesParameters, statistics=_statistics,
    compiled=lambda given: None if given.alpha == "auto" else _ramp(given, given.alpha),
)  # fmt: skip
def lines(merged: Tensor, parameters: LinesParameters, context: Context) -> Tensor:
    """Scale layer l of L by alpha + beta l / (L - 1) (arXiv:2410.17146, eq. 2), each stack of layers by its own ramp.

    A stack of one layer gets alpha, and so does what is in no layer, or else alpha + beta. ``auto`` is the alpha of the
    paper's multi-task setting, (||sum_t tau_t||_1 / ||M||_1) / N: 1/N for a plain sum.
    Differs from the authors' code, which takes any number in a name for the layer's: here it is the block's own.
    """
    alpha = context.statistics["alpha"] if parameters.alpha == "auto" else parameters.alpha
    factor = _ramp(parameters, alpha).factor(context.part, context.layers)
    return merged if factor == 1 else merged * factor


method(
    name="lines",
    summary="One expert: go back to the base in shallow layers, keep deep ones; one number, like linear.",
    source="Wang et al., ICLR 2025, arXiv:2410.17146",
    stages=Stages(combine=("mean", {}), scale=(("lines", {}),)),
    formula="(alpha + beta l / (L-1)) tau in layer l of L",
    promises=Promises(neutral={"alpha": 1.0}, nothing={"alpha": 0.0, "beta": 0.0}, identical="mean"),
    semantics=2,
)
