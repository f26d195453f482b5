"""Keep the largest changes and put the rest back to the base (the first step of TIES)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.matrices import row_size
from ktmerge.merge.program import Trim
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Observer, Parameters, Place, Promises, Stages, Statistic, Tensor


class TrimParameters(Parameters):
    density: float = Field(0.2, ge=0, le=1, description="fraction of the elements that is kept, exactly")
    scope: Literal["tensor", "row", "global"] = Field(
        "tensor", description="rank within each tensor, each output of it, or among all elements of the expert"
    )


def hash_key(context: Context) -> int:
    """Key of the hashes that decide between equal magnitudes."""
    return stream_key(context.seed, "trim", context.expert, context.tensor)


def by_rows(parameters: TrimParameters, place: Place) -> int:
    """The elements of a row, if they are ranked within rows."""
    return row_size(place) if parameters.scope == "row" else 1


def _threshold(parameters: TrimParameters) -> tuple[Statistic, ...]:
    if parameters.scope == "row":
        return ()

    def start(elements: int) -> Observer:
        from ktmerge.merge.kernels.radix import MagnitudeThreshold

        return MagnitudeThreshold(math.floor(parameters.density * elements), elements, hash_key)

    return (Statistic("threshold", parameters.scope, start),)


@stage(
    "trim", "transform", TrimParameters, statistics=_threshold, grain=by_rows,
    compiled=lambda given: None if given.scope == "row" else Trim(given.density, given.scope, "trim"),
)  # fmt: skip
def trim(delta: Tensor, parameters: TrimParameters, context: Context) -> Tensor:
    """Keep the k = floor(density n) elements of largest magnitude (arXiv:2306.01708, 4.1).

    Equal magnitudes at the edge are decided by a hash of (seed, expert, tensor, element), so that exactly k stay and no
    rows are preferred. ``row``: floor(density i) of each output's i.
    Differs from mergekit, which keeps one element of a tensor at least, and decides equal magnitudes by their position.
    """
    if parameters.scope == "row":
        from ktmerge.merge.rows import by_row

        def choose(rows: Tensor, ranks: Tensor, elements: Tensor) -> Tensor:
            wide = rows.shape[1]
            return rows.where(ranks >= wide - math.floor(parameters.density * wide), 0.0)

        return by_row(delta, context, hash_key(context), choose)
    threshold = context.statistics["threshold"]
    return context.kernels.keep(delta, hash_key(context), context.start, threshold)


method(
    name="trim",
    summary="One expert: keep only its largest changes, give the rest back to the base.",
    formula="tau where |tau| is among the largest density n, else 0",
    source="Yadav et al., NeurIPS 2023, arXiv:2306.01708, with one task",
    stages=Stages(transform=(("trim", {}),), combine=("sum", {})),
    experts=(1, 1),
    promises=Promises(neutral={"density": 1.0}, identical="other"),
)
