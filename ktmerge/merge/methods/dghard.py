"""Spectral unforgetting: of a delta, only what stands out from noise (DG-Hard)."""

from __future__ import annotations

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Parameters, Promises, SplitFused, Stages, Tensor


class DgHardParameters(Parameters):
    scale: Amount = Field(1.0, description="times the noise threshold; 0 keeps everything, larger keeps less")
    min_numel: int = Field(1024, ge=0, description="maps with fewer elements pass: too few to tell noise by")
    split_fused: SplitFused = True


@stage("dg_hard", "transform", DgHardParameters, reach="tensor")
def dg_hard(delta: Tensor, parameters: DgHardParameters, context: Context) -> Tensor:
    """Keep the singular directions above the threshold for unknown noise (arXiv:2605.20296; arXiv:1305.5870).

    tau* = scale omega(beta) median(s) / mu_beta, beta = min(o, i) / max(o, i); directions with s <= tau* become zero. A
    map in which nothing stands out becomes the base's. The rounding of bfloat16 weights is such noise, too.

    Differs from the paper's code: embeddings and the head pass as fine-tuned, as their rows are not one map's noise;
    the median of the Marchenko-Pastur distribution is exact, not read off a grid.
    """
    import torch

    from ktmerge.merge.spectra import one_sided, threshold, transformed

    if parameters.scale == 0:
        return delta

    def denoise(own: Tensor, base: Tensor) -> Tensor:
        if own.numel() < parameters.min_numel:
            return own
        found = one_sided(own)
        edge = parameters.scale * threshold(found.values, (own.shape[0], own.shape[1]))
        rank = int((found.values > edge).sum())
        if rank in (0, found.values.numel()):
            return own if rank else torch.zeros_like(own)
        return found.filtered(found.values.new_ones(rank)).float()

    return transformed(delta, context, denoise, fused=parameters.split_fused)


method(
    name="dg_hard",
    summary="One expert and no data: give back what in the change looks like noise; nothing to tune.",
    source="Abro and Tahir, 2026, arXiv:2605.20296, after Gavish and Donoho, 2014, arXiv:1305.5870",
    stages=Stages(transform=(("dg_hard", {}),), combine=("mean", {})),
    otherwise=MEANS,
    formula="U [s > omega(b) median(s) / mu(b)] S V^T of tau = U S V^T, b = min(o, i) / max(o, i)",
    cost="eigh min(o, i)^3",
    promises=Promises(neutral={"scale": 0.0}, identical="mean", elements=False, rotations=True, tolerance=1e-5),
    semantics=2,
)
