"""Model Breadcrumbs: mask the largest changes as outliers and the smallest as noise."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from ktmerge.merge.methods.trim import TrimParameters, by_rows, hash_key
from ktmerge.merge.program import Trim
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Observer, Promises, Stages, Statistic, Tensor


class BreadcrumbsParameters(TrimParameters):
    gamma: float = Field(0.01, ge=0, le=1, description="fraction of the elements taken out as outliers, at the top")


def _trim(parameters: BreadcrumbsParameters) -> Trim:
    return Trim(parameters.density, "global" if parameters.scope == "global" else "tensor", "trim", parameters.gamma)


def _thresholds(parameters: BreadcrumbsParameters) -> tuple[Statistic, ...]:
    if parameters.scope == "row":
        return ()

    def start(which: int, elements: int) -> Observer:
        from ktmerge.merge.kernels.radix import MagnitudeThreshold

        return MagnitudeThreshold(_trim(parameters).counts(elements)[which], elements, hash_key)

    names = ("kept", "outliers")
    return tuple(Statistic(name, parameters.scope, partial(start, which)) for which, name in enumerate(names))


@stage(
    "breadcrumbs", "transform", BreadcrumbsParameters, statistics=_thresholds, grain=by_rows,
    compiled=lambda given: None if given.scope == "row" else _trim(given),
)  # fmt: skip
def breadcrumbs(delta: Tensor, parameters: BreadcrumbsParameters, context: Context) -> Tensor:
    """Take out the floor(gamma n) largest magnitudes and keep the floor(density n) next ones (arXiv:2312.06795, 3).

    If both do not fit, the outliers give way. Equal magnitudes are decided as in trim, which this is for gamma 0.
    ``row``: the same within what goes into each output, as the authors' code has it.
    Differs from mergekit, which decides equal magnitudes by their position; before 0.1.5, where gamma n < 1, its slice
    was empty and the whole change dropped.
    """
    import torch

    key = hash_key(context)
    if parameters.scope == "row":
        from ktmerge.merge.rows import by_row

        def choose(rows: Tensor, ranks: Tensor, elements: Tensor) -> Tensor:
            wide = rows.shape[1]
            first, outliers = _trim(parameters).counts(wide)
            return rows.where((ranks >= wide - first) & (ranks < wide - outliers), 0.0)

        return by_row(delta, context, key, choose)
    kept = context.kernels.keep(delta, key, context.start, context.statistics["kept"])
    outliers = context.kernels.keep(delta, key, context.start, context.statistics["outliers"])
    return torch.where(outliers == 0, kept, 0.0)


# A handful of values make up a norm or a bias; there the masks are left out and the rest of the method stays.
_KEEP_ALL = {"density": 1.0, "gamma": 0.0}

method(
    name="breadcrumbs",
    summary="One expert or several: keep large changes but not the very largest, which move the base most.",
    source="Davari and Belilovsky, ECCV 2024, arXiv:2312.06795",
    stages=Stages(transform=(("breadcrumbs", {}),), combine=("sum", {})),
    lambda_=0.3,
    otherwise={"vector": Stages(combine=("sum", {}))},
    formula="sum_t w_t (tau_t without its gamma n largest, then its density n largest)",
    promises=Promises(neutral=_KEEP_ALL, identical="sum"),
    semantics=2,
)
method(
    name="breadcrumbs_ties",
    summary="As breadcrumbs, for experts that disagree: drop what they pull in opposite directions.",
    source="Davari and Belilovsky, ECCV 2024, arXiv:2312.06795, with the election of arXiv:2306.01708",
    stages=Stages(transform=(("breadcrumbs", {}),), combine=("elect", {})),
    otherwise={"vector": Stages(combine=("elect", {}))},
    formula="disjoint mean, by elected sign, of breadcrumbs(tau_t)",
    promises=Promises(neutral=_KEEP_ALL, identical="mean"),
    semantics=2,
)
