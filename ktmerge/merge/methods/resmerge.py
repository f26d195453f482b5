"""Merge the strongest directions and the rest of each delta apart (ResMerge)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Parameters, Promises, SplitFused, Stages, Tensor

if TYPE_CHECKING:
    from ktmerge.merge.spectra import Spectrum

Member = TypeVar("Member")

_ROUNDING = 1e-12
"""By which the sum of cosines of deltas at right angles may miss their number."""


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
    from ktmerge.merge.spectra import Spectrum, combined, draws, top

    def merge(own: list[Tensor]) -> Tensor:
        if len(own) == 1:
            return own[0]
        heads = together(lambda one: top(one, parameters.rank, draws(context)), own)
        merged = _merged_rest([_rest(one, head) for one, head in zip(own, heads, strict=True)], parameters)
        common = heads[0].matrix()
        for head in heads[1:]:
            common.addmm_(head.left * head.values, head.right.T)
        size = float(common.norm())
        _, cosines = _angles(heads, Spectrum.product)
        length = parameters.head * _mean_of_pairs(cosines.clamp(min=0)) * float(merged.norm())
        return merged.add_(common, alpha=length / size) if size > 0 else merged

    return combined(deltas, context, merge, fused=parameters.split_fused)


def _rest(delta: Tensor, head: Spectrum) -> Tensor:
    """Of a delta that is all head only rounding is left, which is nothing."""
    rest = delta.double().sub_(head.matrix())
    return rest if float(rest.norm()) > 1e-6 * float(delta.norm()) else rest.zero_()


def _merged_rest(rests: list[Tensor], parameters: ResmergeParameters) -> Tensor:
    """A, in place of the first; with the sum k of all cosines c = sqrt(k) / N, as ||sum q_t||^2 = k."""
    count = len(rests)
    lengths, cosines = _angles(rests, lambda one, other: float(one.reshape(-1).dot(other.reshape(-1))))
    whole = float(cosines.sum())
    factors = [1 / count] * count
    if whole > count * (1 + _ROUNDING):
        agreement = min(math.sqrt(whole) / count, 1.0)
        score = ((_mean_of_pairs(cosines) + 1) / 2 + (agreement + 1) / 2) / 2
        beta = parameters.beta_max - (parameters.beta_max - parameters.beta_min) * score
        length = agreement**beta * sum(lengths) / count / math.sqrt(whole)
        factors = [length / one if one else 0.0 for one in lengths]
    merged = rests[0].mul_(factors[0])
    for rest, factor in zip(rests[1:], factors[1:], strict=True):
        merged.add_(rest, alpha=factor)
    return merged


def _angles(members: Sequence[Member], product: Callable[[Member, Member], float]) -> tuple[list[float], Tensor]:
    """Lengths, and cosines ``[N, N]`` of all pairs; 0 with what has no length."""
    import torch

    lengths = [math.sqrt(product(one, one)) for one in members]
    cosines = torch.eye(len(members), dtype=torch.float64) * (torch.tensor(lengths) > 0)
    for a, b in combinations(range(len(members)), 2):
        if lengths[a] * lengths[b] > 0:
            cosines[a, b] = cosines[b, a] = product(members[a], members[b]) / (lengths[a] * lengths[b])
    return lengths, cosines


def _mean_of_pairs(cosines: Tensor) -> float:
    count = cosines.shape[0]
    return float(cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))


method(
    name="resmerge",
    summary="Several experts trained by reinforcement: merge what spreads over many directions, shorten the rest.",
    source="arXiv:2606.02252",
    stages=Stages(combine=("resmerge", {})),
    otherwise=MEANS,
    formula="c^b mean ||R_t|| q + 0.2 S ||A|| h, tau_t = H_t + R_t, q and h the mean directions of R_t and H_t",
    cost="N eigh min(o, i)^3",
    promises=Promises(identical="other", elements=False, rotations=True, tolerance=1e-5),
    semantics=2,
)
