"""Merge the strongest directions and the rest of each delta apart (ResMerge)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Method, Parameters, Promises, SplitFused, Stages

if TYPE_CHECKING:
    from torch import Tensor


class ResmergeParameters(Parameters):
    rank: int = Field(1, ge=0, description="directions of each expert that are its head")
    beta_min: Amount = Field(0.7, description="how much disagreement shortens the rest where experts agree most")
    beta_max: Amount = Field(1.0, description="the same where they agree least")
    head: Amount = Field(0.2, description="length of the merged head, relative to the merged rest, at full agreement")
    split_fused: SplitFused = True


def _objection(parameters: ResmergeParameters, weights: Mapping[str, float]) -> str | None:
    if parameters.beta_min > parameters.beta_max:
        return f"beta_min = {parameters.beta_min:g} is above beta_max = {parameters.beta_max:g}; choose it up to that"
    return None


@stage("resmerge", "combine", ResmergeParameters, reach="tensor", objection=_objection)
def resmerge(deltas: list[Tensor], parameters: ResmergeParameters, context: Context) -> Tensor:
    """The rest of each delta averaged by direction, plus a short common head (arXiv:2606.02252).

    tau_t = H_t + R_t, H_t the ``rank`` largest singular directions. q_t = R_t / ||R_t||, q = sum q_t / ||sum q_t||,
    c the mean of <q_t, q>; with c <= 1 / sqrt(N) the rest is A = mean R_t, else A = c^beta mean ||R_t|| q, beta =
    beta_max - (beta_max - beta_min) s, s the mean of (x + 1) / 2 over x = c and the mean cosine of pairs of R_t. The
    head is the mean of H_t, as long as ``head`` S ||A||, S the mean positive cosine of pairs of heads. M is their sum.
    A single expert that changed a map comes back as it was; equal ones with a shorter head. Tensors that are no linear
    maps are averaged.

    The formula has no weights: each delta is multiplied by its weight over the mean of their magnitudes.
    """
    from ktmerge.merge.decompositions import together
    from ktmerge.merge.spectra import combined, draws, top, total

    def merge(own: list[Tensor]) -> Tensor:
        if len(own) == 1:
            return own[0]
        tops = together(lambda one: top(one, parameters.rank, draws(context)), own)
        # of a delta that is all head only rounding is left
        merged = _rest(
            [_unless_rounding(one.double() - head.matrix(), one) for one, head in zip(own, tops, strict=True)],
            parameters,
        )
        heads = [head.matrix() for head in tops]
        agreement = [max(0.0, cosine) for cosine in _cosines(heads)]
        length = parameters.head * sum(agreement) / len(agreement) * float(merged.norm())
        common = total(heads) / len(heads)
        size = float(common.norm())
        return merged + common * (length / size) if size > 0 else merged

    return combined(deltas, context, merge, fused=parameters.split_fused)


def _unless_rounding(rest: Tensor, delta: Tensor) -> Tensor:
    return rest if float(rest.norm()) > 1e-6 * float(delta.norm()) else rest * 0


def _rest(rests: list[Tensor], parameters: ResmergeParameters) -> Tensor:
    from ktmerge.merge.spectra import total

    count = len(rests)
    lengths = [float(rest.norm()) for rest in rests]

    def units() -> Iterator[Tensor]:
        return (rest / length if length > 0 else rest for rest, length in zip(rests, lengths, strict=True))

    added = total(units())
    size = float(added.norm())
    agreement = sum(float((unit * added).sum()) for unit in units()) / size / count if size > 0 else 0.0
    if agreement <= 1 / math.sqrt(count):
        return total(rests) / count
    pairs = _cosines(rests)
    score = ((sum(pairs) / len(pairs) + 1) / 2 + (agreement + 1) / 2) / 2
    beta = parameters.beta_max - (parameters.beta_max - parameters.beta_min) * score
    length = float(min(agreement, 1.0) ** beta) * sum(lengths) / count
    return added * (length / size)


def _cosines(matrices: list[Tensor]) -> list[float]:
    """Of all pairs; 0 with a matrix of zeros."""
    lengths = [float(one.norm()) for one in matrices]
    return [
        float((matrices[i] * matrices[j]).sum()) / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] > 0 else 0.0
        for j in range(len(matrices))
        for i in range(j)
    ]


method(
    Method(
        name="resmerge",
        summary="Several experts trained by reinforcement: merge what spreads over many directions, shorten the rest.",
        source="arXiv:2606.02252",
        stages=Stages(combine=("resmerge", {})),
        otherwise=MEANS,
        capped=True,
        formula="c^b mean ||R_t|| q + 0.2 S ||A|| h, tau_t = H_t + R_t, q and h the mean directions of R_t and H_t",
        cost="N eigh min(o, i)^3",
        promises=Promises(identical="other", elements=False, rotations=True, tolerance=1e-5),
    )
)
