"""Merge in a basis of outputs that all experts share (KnOTS)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.methods.elect import ElectParameters, elect
from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Tensor
from ktmerge.merge.weights import positive

_FAR_BELOW = 1e-2
"""Share of the strongest expert's response to a direction, from which on a response is no rounding."""


class KnotsParameters(Parameters):
    rule: Literal["ties", "sum"] = Field(
        "ties",
        description="how the coordinates are merged: trim, sign election and weighted mean, or their weighted sum",
    )
    density: float = Field(0.2, ge=0, le=1, description="of ties: fraction of each expert's coordinates that is kept")
    tolerance: float = Field(
        1e-6, ge=0, lt=1, description="basis vectors below this share of the strongest are dropped"
    )
    split_fused: SplitFused = True


def _objection(parameters: KnotsParameters, weights: Mapping[str, float]) -> str | None:
    return positive(parameters, weights) if parameters.rule == "ties" else None


@stage("knots", "combine", KnotsParameters, reach="tensor", objection=_objection)
def knots(deltas: list[Tensor], parameters: KnotsParameters, context: Context) -> Tensor:
    """Merge the experts' coordinates in their common output space (arXiv:2410.19735).

    [tau_1 ... tau_N], side by side along the inputs, = U S [V_1^T ... V_N^T]; M = U merge(S V_1^T, ..., S V_N^T).
    With ``sum`` that is the weighted sum of the deltas, computed as such. A single expert with ``density`` 1 comes back
    as it is. Tensors that are no linear maps are averaged. N counts the experts that changed the map.

    Differs from the paper's code: weak basis vectors are dropped relative to the strongest, not below 1e-4, which would
    make the result depend on the size of the deltas; equals at the edge of the trim are told apart by a hash.
    """
    import torch

    from ktmerge.merge.arithmetic import weighted_total
    from ktmerge.merge.matrices import by_map, changed
    from ktmerge.merge.spectra import least_response, one_sided

    def merge(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        members = [t for t in changed(maps, base) if context.weights[t] != 0]
        if not members:
            return torch.zeros_like(base)
        own, weights = [maps[t] for t in members], tuple(context.weights[t] for t in members)
        if parameters.rule == "sum":
            return weighted_total(own, weights)
        if len(own) == 1 and parameters.density == 1:
            return own[0]
        found = one_sided(torch.cat(own, dim=1))
        parts = torch.split(found.coordinates(found.above(parameters.tolerance)), base.shape[1], 1)
        coordinates = _settled(parts, [least_response(one, base) for one in own])
        trimmed = [
            _trimmed(one, parameters.density, replace(context, expert=context.experts[t], start=0), number)
            for one, t in zip(coordinates, members, strict=True)
        ]
        elected = elect(trimmed, ElectParameters(), replace(context, weights=weights))
        return found.back(elected.double()).float()

    return by_map(deltas, context, merge, fused=parameters.split_fused)


def _settled(coordinates: Sequence[Tensor], least: Sequence[float]) -> list[Tensor]:
    """All deltas', in float32; rows of rounding are 0, or an expert would have a vote in directions it never took."""
    import torch

    sizes = [one.norm(dim=1, keepdim=True) for one in coordinates]
    far_below = _FAR_BELOW * torch.stack(sizes).amax(0)
    return [
        torch.where((size > floor) | (size > far_below), one, 0.0).float()
        for one, size, floor in zip(coordinates, sizes, least, strict=True)
    ]


def _trimmed(values: Tensor, density: float, context: Context, number: int) -> Tensor:
    """The floor(density n) largest of n coordinates."""
    from ktmerge.merge.kernels.radix import MagnitudeThreshold

    def key(context: Context) -> int:
        return stream_key(context.seed, f"knots {number}", context.expert, context.tensor)

    flat = values.reshape(-1)
    search = MagnitudeThreshold(math.floor(density * flat.numel()), flat.numel(), key)
    while not search.done:
        search.observe(flat, context)
        search.end_pass()
    return context.kernels.keep(flat, key(context), 0, search.result()).view_as(values)


method(
    name="knots",
    summary="Several LoRA experts: TIES in output directions they share, where their signs can be compared.",
    source="Stoica et al., ICLR 2025, arXiv:2410.19735",
    stages=Stages(combine=("knots", {})),
    otherwise=MEANS,
    formula="U ties(S V_1^T, ..., S V_N^T), [tau_1 ... tau_N] = U S [V_1^T ... V_N^T]",
    cost="eigh min(o, N i)^3 + N oi min(o, N i)",
    promises=Promises(neutral={"density": 1.0}, identical="mean", elements=False, tolerance=1e-5),
    semantics=5,
)
