"""Task singular vectors: each expert's strongest directions, made orthogonal to the others' (TSV-M)."""

from __future__ import annotations

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Tensor


class TsvParameters(Parameters):
    fraction: float | None = Field(
        None, gt=0, le=1, description="share of the smaller dimension that each expert gets; 1 / N if not given"
    )
    split_fused: SplitFused = True


@stage("tsv_m", "combine", TsvParameters, reach="tensor")
def tsv_m(deltas: list[Tensor], parameters: TsvParameters, context: Context) -> Tensor:
    """Sum of each expert's top singular directions, decorrelated between experts (arXiv:2412.00081, section 3.2).

    k = max(1, floor(min(o, i) / N)); U, S, V the k largest triplets of all experts side by side;
    M = polar(U) diag(S) polar(V)^T. Of a single expert that changed a map the delta is returned; experts at right
    angles on both sides with no more than k directions give their sum. Tensors that are no linear maps are averaged.

    The formula has no weights: each delta is multiplied by its weight over the mean of their magnitudes.

    Differs from the paper's code: directions whose singular value is rounding (1e-5 of the largest) stay out, both an
    expert's own, which of an expert of low rank are noise across the others' directions, and those of the polar
    factors, as where experts share a direction a full factor adds an arbitrary one; N counts the experts that changed
    the map.
    """
    import torch

    from ktmerge.merge.decompositions import together
    from ktmerge.merge.spectra import combined, draws, polar, top

    def merge(own: list[Tensor]) -> Tensor:
        if len(own) == 1:
            return own[0]
        size = min(own[0].shape)
        share = 1 / len(own) if parameters.fraction is None else parameters.fraction
        count = max(1, size // len(own) if parameters.fraction is None else int(size * share))
        found = together(lambda one: top(one, count, draws(context)), own)
        sides = ([one.left for one in found], [one.right for one in found])
        left, right = together(lambda side: polar(torch.cat(side, dim=1)), sides)
        return (left * torch.cat([one.values for one in found])) @ right.T

    return combined(deltas, context, merge, fused=parameters.split_fused)


method(
    name="tsv_m",
    summary="Several unlike experts: add what each does most strongly, kept out of the others' way.",
    source="Gargiulo et al., CVPR 2025, arXiv:2412.00081",
    stages=Stages(combine=("tsv_m", {})),
    otherwise=MEANS,
    formula="polar(U) diag(S) polar(V)^T, [U, S, V] = top min(o, i) / N singular triplets of each tau_t",
    cost="(N + 2) eigh min(o, i)^3",
    promises=Promises(identical="other", elements=False, rotations=True, tolerance=1e-5),
)
