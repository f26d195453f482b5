"""Keep the head of each delta's spectrum and make up for what was cut off (STAR)."""

from __future__ import annotations

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Tensor


class StarParameters(Parameters):
    eta: float = Field(0.4, ge=0, le=1, description="share of the sum of singular values that the kept ones hold")
    split_fused: SplitFused = True


@stage("star", "transform", StarParameters, reach="tensor")
def star(delta: Tensor, parameters: StarParameters, context: Context) -> Tensor:
    """Keep the largest singular values and rescale them to the sum of all (arXiv:2502.10339).

    r the fewest with sum_{k <= r} s_k >= eta sum s; s'_k = s_k sum s / sum_{k <= r} s_k.
    """
    import torch

    from ktmerge.merge.spectra import one_sided, rank_of, transformed

    if parameters.eta == 1:
        return delta

    def rescale(own: Tensor, base: Tensor) -> Tensor:
        found = one_sided(own)
        kept = found.values[: rank_of(found.values, "nuclear", 0, parameters.eta)]
        if not kept.numel():
            return torch.zeros_like(own)
        return found.filtered((found.values.sum() / kept.sum()).expand(kept.shape)).float()

    return transformed(delta, context, rescale, fused=parameters.split_fused)


method(
    name="star",
    summary="Several experts: cut the small directions of each, which interfere most, keep its strength; average.",
    source="Lee et al., NAACL 2025, arXiv:2502.10339",
    stages=Stages(transform=(("star", {}),), combine=("mean", {})),
    otherwise=MEANS,
    formula="mean_t U_r (S_r sum s / sum_r s) V_r^T of tau_t = U S V^T, sum_r s >= 0.4 sum s",
    cost="N eigh min(o, i)^3",
    promises=Promises(neutral={"eta": 1.0}, identical="other", elements=False, rotations=True, tolerance=1e-5),
    semantics=2,
)
