"""A sparse patch of the change, fitted exactly: least squares on the entries that may move."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.methods.backmerge import NEEDS
from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Need, Parameters, Promises, SplitFused, Stages, Tensor

if TYPE_CHECKING:
    from ktmerge.merge.covariance import Covariance


class PatchParameters(Parameters):
    density: float = Field(
        0.1, ge=0, le=1, description="fraction of each row's entries, or of the columns, that may move"
    )
    kappa: Amount = Field(0.0, description="weight of leaving the outputs for upstream inputs as they were")
    support: Literal["row", "shared"] = Field(
        "row", description="which entries move is chosen for every row, or columns for all rows: one solve, not o"
    )
    ridge: float = Field(1e-3, ge=1e-9, le=1, description="added to the inputs' variances, relative to their mean")
    split_fused: SplitFused = True


def _needs(parameters: PatchParameters) -> tuple[Need, ...]:
    return NEEDS if parameters.kappa else NEEDS[1:]


@stage("exact_patch", "transform", PatchParameters, reach="tensor", needs=_needs)
def exact_patch(delta: Tensor, parameters: PatchParameters, context: Context) -> Tensor:
    """The best delta on a support S: delta_S = [(H_d + kappa C_u)_SS]^-1 (H_d tau^T)_S for every row.

    It minimises ||(delta - tau) H_d^(1/2)||^2 + kappa ||delta C_u^(1/2)||^2, H_d = C_d + ridge * mean variance. The
    support: the k = floor(density i) largest |tau_ij| sqrt(C_d,jj) of a row, or columns by ||tau_j|| sqrt(C_d,jj).
    Entries off it are zero exactly. Least squares on a fixed support is what Model Tailor's decoration
    (arXiv:2402.12048) approximates.
    """
    import torch

    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.patching import fitted
    from ktmerge.merge.sampled import Sampled

    if parameters.density == 0:
        return torch.zeros_like(delta)
    if parameters.density == 1 and not parameters.kappa:
        return delta
    sampled = Sampled(context, fused=parameters.split_fused)

    def patch(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        values, wide = maps[0].double(), base.shape[1]
        own = sampled.covariance(context.expert, number, wide)
        key = stream_key(context.seed, "exact_patch", context.expert, f"{context.tensor}#{number}")
        mask = _support(values, own, parameters, key)
        ridged = own.ridged(parameters.ridge * (own.trace() / wide or 1.0))
        moment, target = ridged.dense(), ridged.times(values)
        if parameters.kappa:
            moment = moment + parameters.kappa * sampled.covariance("", number, wide).dense()
        return fitted(target, moment, mask).float()

    return by_map([delta], context, patch, fused=parameters.split_fused)


def _support(delta: Tensor, own: Covariance, parameters: PatchParameters, key: int) -> Tensor:
    """Mask ``[o, i]`` of the entries that may move."""
    from ktmerge.merge.ranking import largest, largest_of_rows

    felt, count = own.variances().sqrt(), math.floor(parameters.density * delta.shape[1])
    if parameters.support == "shared":
        return largest(delta.norm(dim=0) * felt, count, key).expand_as(delta)
    return largest_of_rows(delta.abs() * felt, count, key)


method(
    name="exact_patch",
    summary="One expert and its data: few entries move, each to where the outputs miss the tuned model's least.",
    source="ktmerge; the exact form of the decoration of Model Tailor, ICML 2024, arXiv:2402.12048",
    stages=Stages(transform=(("exact_patch", {}),), combine=("stitch", {})),
    otherwise=MEANS,
    formula="[(H_d + kappa C_u)_SS]^-1 (H_d tau^T)_S on the support S of each row, 0 elsewhere",
    cost="o (density i)^3 / 3 + R i^2",
    promises=Promises(neutral={"density": 1.0}, identical="mean", elements=False, tolerance=1e-5),
    semantics=4,
)
