"""SLERP of deltas: two experts on the great circle between them, or several, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ktmerge.merge.program import Measured
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Observer, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.weights import positive

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.geometry import Geometry


class SlerpParameters(Parameters):
    t: float | None = Field(
        None, ge=0, le=1, description="how far from the first expert, by name, to the second; default: its weight"
    )
    granularity: Literal["tensor", "row", "column"] = Field(
        "tensor", description="one angle for each tensor, or for each row (output) or column (input) of a matrix"
    )


def _objection(parameters: SlerpParameters, weights: Mapping[str, float]) -> str | None:
    if parameters.t is not None and len(weights) != 2:
        return f"t goes from one expert to a second, there are {len(weights)}; give the experts weights instead"
    return positive(parameters, weights)


def inner_products(granularity: Literal["tensor", "row", "column"] = "tensor") -> tuple[Statistic, ...]:
    """The statistic ``geometry``: inner products of the deltas, of a tensor or of each row or column."""

    def start(elements: int) -> Observer:
        from ktmerge.merge.gram import GramObserver

        return GramObserver(granularity)

    return (Statistic("geometry", "tensor", start),)


def _coefficients(geometry: Geometry, parameters: SlerpParameters, weights: Sequence[float]) -> NDArray[Any]:
    """``[G, N]``."""
    from ktmerge.merge.sphere import slerp_coefficients

    steps = [weights[n] / (sum(weights[: n + 1]) or 1.0) for n in range(1, len(weights))]
    return slerp_coefficients(geometry, steps if parameters.t is None else [parameters.t])


def _compiled(parameters: SlerpParameters, weights: Mapping[str, float]) -> Measured | None:
    if parameters.granularity != "tensor":
        return None
    own = list(weights.values())
    return Measured("geometry", "tensor", lambda geometry: _coefficients(geometry, parameters, own)[0].tolist())


@stage(
    "slerp", "combine", SlerpParameters, objection=_objection, compiled=_compiled,
    statistics=lambda given: inner_products(given.granularity),
)  # fmt: skip
def slerp(deltas: list[Tensor], parameters: SlerpParameters, context: Context) -> Tensor:
    """Go along the great circle from delta to delta: sin((1-t)W)/sin(W) a + sin(tW)/sin(W) b (Shoemake, 1985).

    W is the angle between a and b; t the second's share w_b / (w_a + w_b), and of expert m its share among the first m
    (as WARP does, arXiv:2406.16768), in the order of their names: of three or more, the order matters. A straight line
    where |cos W| > 0.9995, towards the opposite, and from or to a delta of norm 0.
    Differs from mergekit's slerp, which turns weights, not deltas: siblings lie within a degree of one another, so that
    the circle between them is a straight line and slerp the mean. As mergekit's nuslerp with a base, which takes the
    tensor as a whole unless nuslerp_flatten is false, and calls a "row" what is a column here.
    """
    from ktmerge.merge.gram import combined

    geometry = context.statistics["geometry"]
    if geometry is None:
        return deltas[0].clone()
    return combined(deltas, _coefficients(geometry, parameters, context.weights), parameters.granularity, context)


method(
    name="slerp",
    summary="Two experts: the point between them on the arc, as far from the base as they are; t says where.",
    source="Shoemake, SIGGRAPH 1985; on deltas as in mergekit's NuSLERP",
    stages=Stages(combine=("slerp", {})),
    experts=(2, 2),
    formula="(sin((1-t)W) tau_a + sin(tW) tau_b) / sin W, cos W = <tau_a, tau_b> / (|tau_a| |tau_b|)",
    cost="N^2 oi",
    promises=Promises(neutral=None, identical="mean", tolerance=1e-6),
)
method(
    name="nuslerp",
    summary="As slerp, with an angle of its own for every row (or column) of a matrix.",
    source="NuSLERP, mergekit",
    stages=Stages(combine=("slerp", {"granularity": "row"})),
    experts=(2, 2),
    formula="as slerp, row by row",
    cost="N^2 oi",
    promises=Promises(neutral=None, identical="mean", tolerance=1e-6, elements=False),
)
