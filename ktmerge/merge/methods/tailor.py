"""Model Tailor: a sparse patch of the change, with the entries that stay corrected for those that go back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.methods.backmerge import NEEDS
from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Need, Parameters, Promises, SplitFused, Stages, Tensor

if TYPE_CHECKING:
    from ktmerge.merge.tailoring import Tailor


class TailorParameters(Parameters):
    density: float = Field(0.1, ge=0, le=1, description="fraction of each block's entries that is kept, exactly")
    score: Literal["wanda", "delta_obs", "mag", "up_aware", "paper"] = Field(
        "wanda",
        description="what is kept: |tau| sqrt(C_jj), the loss tau^2 / [H^-1]_jj, |tau|, |tau| sqrt(C_jj) over what "
        "upstream feels there, or the paper's mix of |tau| and the tuned weight's own loss",
    )
    decoration: Literal["none", "scalar", "obs", "exact", "paper"] = Field(
        "obs",
        description="how kept entries make up for the others: not, by one factor, column by column, exactly, or "
        "column by column with the sign of the published code",
    )
    kappa: float = Field(
        0.1, gt=0, le=1e38, description="of score up_aware: added to what upstream feels, over its mean"
    )
    block: int = Field(128, ge=1, description="columns that are ranked together")
    damp: float = Field(0.01, ge=1e-9, le=1, description="added to the inputs' variances, relative to their mean")
    split_fused: SplitFused = True


def _needs(parameters: TailorParameters) -> tuple[Need, ...]:
    return NEEDS if parameters.score == "up_aware" else NEEDS[1:]


@stage("model_tailor", "transform", TailorParameters, reach="tensor", needs=_needs)
def model_tailor(delta: Tensor, parameters: TailorParameters, context: Context) -> Tensor:
    """Keep the entries of highest score in every block of columns, and correct them for the rest (arXiv:2402.12048).

    H = X^T X / R + damp * mean variance of the tuned model's inputs, H^-1 = R^T R. ``obs``: columns from left to right;
    an entry put back leaves e = tau / R_jj, and later columns lose e R_j: what a block keeps is decided when its turn
    comes. ``exact``: the least-squares patch on the same entries. ``scalar``: the best factor on all of them. An input
    that is always 0 has the mean variance. Equal scores at the edge are decided by a hash of position.

    Differs from the published code, unless ``score`` and ``decoration`` are ``paper``: what is put back is the change,
    so the change and not the tuned weight is scored; errors are subtracted from later columns, as in SparseGPT, not
    added, which makes the outputs worse than no correction does.
    Differs from the published code in what it is for: that tailors the last twelve blocks of one model and puts its
    projector back to the base. Here all maps are tailored and all else is the expert's, unless a rule says keep: base.
    """
    import torch

    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.sampled import Sampled
    from ktmerge.merge.tailoring import Tailor

    if parameters.density == 1:
        return delta
    if parameters.density == 0:
        return torch.zeros_like(delta)
    sampled = Sampled(context, fused=parameters.split_fused)

    def tailor(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        own = sampled.covariance(context.expert, number, base.shape[1])
        variances = own.variances()
        mean = float(variances.mean()) or 1.0
        upstream = None
        if parameters.score == "up_aware":
            upstream = sampled.covariance("", number, base.shape[1]).variances().sqrt()
            upstream = upstream + parameters.kappa * (float(upstream.mean()) or 1.0)
        dead = torch.where(variances > 0, 0.0, mean)
        found = Tailor(
            base=base.double(),
            inputs=replace(own, diagonal=own.diagonal + parameters.damp * mean + dead),
            felt=variances.sqrt(),
            upstream=upstream,
            score=parameters.score,
            density=parameters.density,
            block=parameters.block,
            key=stream_key(context.seed, "model_tailor", context.expert, f"{context.tensor}#{number}"),
        )
        return _patch(maps[0].double(), found, parameters.decoration).float()

    return by_map([delta], context, tailor, fused=parameters.split_fused)


def _patch(delta: Tensor, tailor: Tailor, decoration: str) -> Tensor:
    """The delta that stays, decorated."""
    import torch

    from ktmerge.merge.patching import fitted

    if decoration in ("obs", "paper"):
        return tailor.swept(delta, -1 if decoration == "obs" else 1)
    mask = tailor.mask(delta)
    if decoration == "exact":
        moment = tailor.inputs.dense()
        return fitted(delta @ moment, moment, mask)
    kept = torch.where(mask, delta, 0.0)
    if decoration == "scalar":
        felt = tailor.inputs.times(kept)
        size = float((felt * kept).sum())
        return kept * (float((felt * delta).sum()) / size) if size else kept
    return kept


_PROMISES = Promises(neutral={"density": 1.0}, identical="mean", elements=False, tolerance=1e-5)

_tailored = partial(
    method,
    source="Zhu et al., ICML 2024, arXiv:2402.12048",
    otherwise=MEANS,
    formula="m (tau + correction), m the entries of largest score in each block of columns",
    cost="i^3 + R i^2 + oi^2; of R < i / 2 samples i R^2 + oi R",
    semantics=3,
)
_tailored(
    name="model_tailor",
    summary="One expert and its data: keep a small patch of the change, corrected so that outputs hardly miss the "
    "rest.",
    stages=Stages(transform=(("model_tailor", {}),), combine=("stitch", {})),
    promises=_PROMISES,
)
_tailored(
    name="model_tailor_paper",
    summary="Model Tailor as its published code has it, to compare with; model_tailor is better.",
    stages=Stages(transform=(("model_tailor", {"score": "paper", "decoration": "paper"}),), combine=("stitch", {})),
    promises=replace(_PROMISES, scale=False, sign=False),  # it scores the tuned weight, in which the base is
)
