"""Keep the largest singular directions of a delta, or all but them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Tensor


class SvdTruncateParameters(Parameters):
    rule: Literal["rank", "fraction", "energy", "nuclear", "stable", "participation"] = Field(
        "energy",
        description="how many directions count as large: so many, a fraction of the smaller dimension, those that hold "
        "a share of sum s^2 or of sum s, the stable rank, or the participation of s",
    )
    rank: int = Field(16, ge=0, description="of the rule rank")
    share: float = Field(0.9, ge=0, le=1, description="the fraction or share of the rules that have one")
    keep: Literal["head", "tail"] = Field("head", description="keep the large directions, or everything but them")
    split_fused: SplitFused = True


@stage("svd_truncate", "transform", SvdTruncateParameters, reach="tensor")
def svd_truncate(delta: Tensor, parameters: SvdTruncateParameters, context: Context) -> Tensor:
    """Keep the r largest singular directions of each map, tau' = U_r S_r V_r^T, or with ``tail`` tau - U_r S_r V_r^T.

    r by one of six rules. Few directions of a large map are found by subspace iteration from a keyed start, which among
    nearly equal singular values is close to the best choice rather than exact.
    """
    import torch

    from ktmerge.merge.spectra import draws, one_sided, rank_of, top, transformed

    rule, head = parameters.rule, parameters.keep == "head"

    def truncate(own: Tensor, base: Tensor) -> Tensor:
        if rule == "rank":
            rank, whole = parameters.rank, parameters.rank >= min(own.shape)
        elif parameters.share in (0, 1) and rule in ("fraction", "energy", "nuclear"):
            rank, whole = 0, parameters.share == 1
        else:
            found = one_sided(own)
            rank = rank_of(found.values, rule, 0, parameters.share)
            kept = found.filtered(torch.ones_like(found.values[:rank]))
            return (kept if head else own.double() - kept).float()
        if whole or rank == 0:
            return own if whole == head else torch.zeros_like(own)
        kept = top(own, rank, draws(context)).matrix()
        return (kept if head else own.double() - kept).float()

    return transformed(delta, context, truncate, fused=parameters.split_fused)


method(
    name="svd_truncate",
    summary="One expert: keep the few directions in which it moved most, or give just those back (keep: tail).",
    source="Eckart and Young, Psychometrika 1936; on deltas e.g. Gargiulo et al., CVPR 2025, arXiv:2412.00081",
    stages=Stages(transform=(("svd_truncate", {}),), combine=("mean", {})),
    otherwise=MEANS,
    formula="U_r S_r V_r^T of tau = U S V^T, r the fewest with sum_r s^2 >= 0.9 sum s^2",
    cost="eigh min(o, i)^3",
    promises=Promises(neutral={"share": 1.0}, identical="mean", elements=False, rotations=True, tolerance=1e-5),
    semantics=2,
)
