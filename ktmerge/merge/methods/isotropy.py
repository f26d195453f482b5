"""Even out the spectrum of the merged delta, so that no expert's strong directions drown another's (Iso)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Tensor

Preserved = Literal["nuclear", "frobenius"]
Edge = Literal["rounding", "noise"]


class IsotropyParameters(Parameters):
    power: float = Field(
        0.0, ge=0, le=1, description="of the singular values; 0 makes all equal, 1 leaves the sum as is"
    )
    preserve: Preserved = Field(
        "nuclear", description="what stays the same: the mean singular value, as published, or the Frobenius norm"
    )
    above: Edge = Field(
        "rounding",
        description="what is evened out: all singular values, but those that are rounding go; or those above the noise "
        "that the median tells of, and the others stay",
    )
    split_fused: SplitFused = True


class IsoCtsParameters(Parameters):
    common: float = Field(0.8, ge=0, le=1, description="share of the directions that all experts have together")
    split_fused: SplitFused = True


@stage("isotropy", "combine", IsotropyParameters, reach="tensor")
def isotropy(deltas: list[Tensor], parameters: IsotropyParameters, context: Context) -> Tensor:
    """Sum of the deltas with its singular values evened out: sum_t tau_t = U S V^T, M = c U S^p V^T (arXiv:2502.04959).

    c keeps the mean of the min(o, i) singular values (``nuclear``; with p = 0 Iso-C's mean(S) U V^T) or ||S||
    (``frobenius``). With p = 0 the weakest directions, noise most of all, are raised to the mean; p = 0.5 is milder.
    One expert does not come back as it was unless p = 1. With ``above: noise`` only what stands out from noise, as in
    dg_hard, is evened out, by itself. Tensors that are no linear maps are averaged.

    The formula has no weights: each delta is multiplied by its weight over the mean of their magnitudes.

    Differs from the paper's code: directions whose singular value is rounding stay out, as their vectors are arbitrary.
    """
    from ktmerge.merge.spectra import combined, total

    def merge(own: list[Tensor]) -> Tensor:
        added = total(own)
        return (
            added if parameters.power == 1 else evened(added, parameters.power, parameters.preserve, parameters.above)
        )

    return combined(deltas, context, merge, fused=parameters.split_fused)


def evened(matrix: Tensor, power: float, preserve: Preserved, above: Edge = "rounding") -> Tensor:
    """c U S^p V^T of ``[o, i]``, float64; see `isotropy`."""
    import torch

    from ktmerge.merge.spectra import NOISE, one_sided, threshold

    found = one_sided(matrix)
    noise = above == "noise"
    edge = threshold(found.values, (matrix.shape[0], matrix.shape[1])) if noise else NOISE * float(found.values[0])
    values, rest = found.values[found.values > edge], found.values[found.values <= edge]
    if not values.numel():
        return matrix
    powers = values**power
    if preserve == "frobenius":
        scale = values.norm() / powers.norm()
    else:
        # with p = 0 the mean over all of min(o, i), those that stay out included
        count = float(powers.sum()) if noise or power else found.values.numel()
        scale = values.sum() / count
    factors = scale * powers / values
    return found.filtered(torch.cat([factors, torch.ones_like(rest)]) if noise else factors)


@stage("iso_cts", "combine", IsoCtsParameters, reach="tensor")
def iso_cts(deltas: list[Tensor], parameters: IsoCtsParameters, context: Context) -> Tensor:
    """Common directions of the sum and specific ones of each expert, all equally strong (Iso-CTS, arXiv:2502.04959).

    r = min(o, i), specific = round((r - floor(common r)) / N) N (half to even), k = r - specific. U_c, S_c, V_c the k
    largest triplets of sum_t tau_t; of each (I - U_c U_c^T) tau_t the specific / N largest; side by side, U, S and V:
    M = mean(S) polar(U) polar(V)^T. With no room for specific directions this is Iso-C. One expert does not come back
    as it was. Tensors that are no linear maps are averaged.

    The formula has no weights: each delta is multiplied by its weight over the mean of their magnitudes.

    Differs from the paper's code: directions whose singular value is rounding stay out, as their vectors are arbitrary.
    """
    from ktmerge.merge.spectra import combined

    return combined(
        deltas, context, lambda own: _common_and_specific(own, parameters.common), fused=parameters.split_fused
    )


def _common_and_specific(own: list[Tensor], common: float) -> Tensor:
    import torch

    from ktmerge.merge.decompositions import together
    from ktmerge.merge.spectra import Spectrum, one_sided, polar, total

    added = total(own)
    size = min(added.shape)
    count = specific_count(size, common, len(own))
    shared = one_sided(added).top(size - count * len(own))

    def specific(delta: Tensor) -> Spectrum:
        rest = delta.double() - shared.left @ (shared.left.T @ delta.double())
        found = one_sided(rest).top(count) if count else shared.first(0)
        # what is left of a delta inside the common space is rounding
        return found.first(int((found.values > 1e-6 * float(delta.norm())).sum()))

    triplets = [*together(specific, own), shared]
    strength = torch.cat([one.values for one in triplets]).sum() / size
    sides = ([one.left for one in triplets], [one.right for one in triplets])
    left, right = together(lambda side: polar(torch.cat(side, dim=1)), sides)
    return strength * left @ right.T


def specific_count(size: int, common: float, experts: int) -> int:
    """Specific directions of each expert: so many that N times them is the even share of what common ones leave."""
    each = round((size - int(common * size)) / experts)
    return min(each, size // experts)


_SOURCE = "Marczak et al., ICML 2025, arXiv:2502.04959"
_PROMISES = Promises(neutral=None, identical="other", elements=False, rotations=True, tolerance=1e-5)

method(
    name="iso_c",
    summary="Several experts whose strong directions drown each other: make all directions of their sum equally "
    "strong.",
    source=_SOURCE,
    stages=Stages(combine=("isotropy", {})),
    otherwise=MEANS,
    formula="mean(S) U V^T of sum_t tau_t = U S V^T",
    cost="eigh min(o, i)^3",
    promises=_PROMISES,
)
method(
    name="soft_iso",
    summary="As iso_c, but halfway: weak directions are raised without letting noise catch up; try it on language "
    "models.",
    source=f"{_SOURCE}; softened by ktmerge",
    stages=Stages(combine=("isotropy", {"power": 0.5, "preserve": "frobenius"})),
    otherwise=MEANS,
    formula="||S|| / ||S^p|| U S^p V^T of sum_t tau_t = U S V^T, p = 0.5",
    cost="eigh min(o, i)^3",
    promises=replace(_PROMISES, neutral={"power": 1.0}),
)
method(
    name="iso_cts",
    summary="As iso_c with many experts: a fifth of the directions is reserved for what only one of them has.",
    source=_SOURCE,
    stages=Stages(combine=("iso_cts", {})),
    otherwise=MEANS,
    formula="mean(S) polar(U) polar(V)^T, [U, S, V] = top 80 % of sum_t tau_t and the rest from each beyond them",
    cost="(N + 3) eigh min(o, i)^3",
    promises=_PROMISES,
)
