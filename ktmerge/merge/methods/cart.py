"""Centred merging: the average, and a few directions of how each expert differs from it (CART)."""

from __future__ import annotations

import math

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Parameters, Promises, SplitFused, Stages, Tensor
from ktmerge.merge.weights import positive


class CartParameters(Parameters):
    fraction: float = Field(
        0.06, ge=0, le=1, description="of the smaller dimension: directions kept of each difference"
    )
    mu: Amount = Field(1.0, description="weight of the specific part; 0 leaves the average")
    split_fused: SplitFused = True


@stage("cart", "combine", CartParameters, reach="tensor", objection=positive)
def cart(deltas: list[Tensor], parameters: CartParameters, context: Context) -> Tensor:
    """Average of the experts and the low-rank part of how each differs from it (arXiv:2412.12153).

    c = sum_t w_t tau_t / sum_t w_t; M = c + mu sum_t (w_t / mean w) SVD_k(tau_t - c), k = ceil(fraction min(o, i)).
    With all directions the differences cancel and the average is left, as with none. Tensors that are no linear maps
    are averaged. Few directions of a large map are found by subspace iteration from a keyed start.
    """
    import torch

    from ktmerge.merge.decompositions import together
    from ktmerge.merge.matrices import by_map, changed
    from ktmerge.merge.spectra import draws, top
    from ktmerge.merge.weights import relative

    def merge(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        members = [t for t in changed(maps, base) if context.weights[t] > 0]
        if len(members) < 2:
            return maps[members[0]] if members else torch.zeros_like(base)
        own = [maps[t].double() for t in members]
        weights = relative([context.weights[t] for t in members])
        centre = torch.stack([one * w for one, w in zip(own, weights, strict=True)]).mean(0)
        count = math.ceil(parameters.fraction * min(base.shape) * (1 - 1e-9))
        if parameters.mu == 0 or count in (0, min(base.shape)):
            return centre.float()
        pairs = list(zip(own, weights, strict=True))
        parts = together(lambda pair: pair[1] * low_rank(pair[0] - centre, pair[0], count), pairs)
        return (centre + parameters.mu * torch.stack(parts).sum(0)).float()

    def low_rank(difference: Tensor, delta: Tensor, count: int) -> Tensor:
        if float(difference.norm()) <= 1e-7 * float(delta.norm()):
            return torch.zeros_like(difference)  # equal experts differ from their average by rounding
        return top(difference, count, draws(context)).matrix()

    return by_map(deltas, context, merge, fused=parameters.split_fused)


method(
    name="cart",
    summary="Several experts: their average whole, and the few directions in which each stands apart from it.",
    source="Choi et al., 2024, arXiv:2412.12153",
    stages=Stages(combine=("cart", {})),
    otherwise=MEANS,
    formula="c + mu sum_t SVD_k(tau_t - c), c = mean_t tau_t, k = 6 % of min(o, i)",
    cost="N eigh min(o, i)^3",
    promises=Promises(identical="mean", elements=False, rotations=True, tolerance=1e-5),
)
