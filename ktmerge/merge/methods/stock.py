"""Model Stock: how far to trust the mean of several runs, from the angles between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ktmerge.merge.methods.slerp import inner_products
from ktmerge.merge.program import Measured
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive

if TYPE_CHECKING:
    from ktmerge.merge.geometry import Geometry


class StockParameters(Parameters):
    granularity: Literal["tensor", "row"] = Field(
        "tensor", description="one ratio for each tensor, or for each row (output) of a matrix"
    )


def _compiled(parameters: StockParameters, weights: Mapping[str, float]) -> Measured | None:
    if parameters.granularity != "tensor":
        return None
    own = tuple(weights.values())
    return Measured("geometry", "tensor", lambda geometry: _coefficients(geometry, own)[0].tolist())


@stage(
    "stock", "combine", StockParameters, objection=positive, compiled=_compiled,
    statistics=lambda given: inner_products(given.granularity),
)  # fmt: skip
def stock(deltas: list[Tensor], parameters: StockParameters, context: Context) -> Tensor:
    """M = t mean_t tau_t with t = N c / (1 + (N - 1) c), c the mean cosine of pairs (arXiv:2403.19522).

    t is kept within 0 and 1: no positive cosine, no step. N, c and the (weighted) mean are of the experts that moved
    the tensor or row and have a weight; one alone has no angle to judge by and stays.
    Differs from mergekit, where t goes below 0 and beyond 1 with negative cosines (-12 for N = 4 and c = -0.3), and
    where deltas of norms whose product is below 1e-6 count as orthogonal, which gives small tensors back to the base.
    """
    from ktmerge.merge.gram import combined

    geometry = context.statistics["geometry"]
    if geometry is None:
        return deltas[0].clone()
    return combined(deltas, _coefficients(geometry, context.weights), parameters.granularity, context)


def _coefficients(geometry: Geometry, weights: tuple[float, ...]) -> Any:
    """``[G, N]``."""
    import numpy as np

    moved = (geometry.norms > 0) & (np.asarray(weights) > 0)
    number = moved.sum(1)
    pairs = np.maximum(number * (number - 1) / 2, 1)
    cosines = geometry.cosines * (moved[:, :, None] & moved[:, None, :])
    cosine = np.triu(cosines, 1).sum((1, 2)) / pairs
    cosine = np.clip(np.where(number == 1, 1.0, cosine), 0.0, 1.0)
    ratio = number * cosine / (1 + np.maximum(number - 1, 0) * cosine)
    shares = np.where(moved, np.asarray(weights), 0.0)
    total = shares.sum(1, keepdims=True)
    return ratio[:, None] * np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)


method(
    name="model_stock",
    summary="Two or more independent runs of one task: their mean, the closer to the base the less they agree.",
    source="Jang et al., ECCV 2024, arXiv:2403.19522",
    stages=Stages(combine=("stock", {})),
    experts=(2, None),
    formula="t mean_t tau_t, t = N c / (1 + (N-1) c) within [0, 1], c = mean cosine of pairs",
    cost="N^2 oi",
    promises=Promises(neutral=None, identical="mean", tolerance=1e-6),
    semantics=2,
)
