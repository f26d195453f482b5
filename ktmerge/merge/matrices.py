"""The linear maps inside a tensor, as fp32 matrices with outputs as rows, and back. For stages of reach ``tensor``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ktmerge.checkpoints.matrices import MatrixLayout

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.stage import Context


def split(values: Tensor, context: Context, *, fused: bool = True) -> list[Tensor]:
    """Views ``[o, i]`` of every linear map in ``values``: each of stacked experts, each of fused maps.

    Args:
        values: the whole tensor, shaped, of class matrix.
        context: of the stage.
        fused: whether maps that share a tensor (query, key and value; gate and up) are taken apart.
    """
    layout = _layout(values, context, fused)
    stacked = values.reshape(math.prod(values.shape[:-2]), *values.shape[-2:])
    if layout.transposed:
        stacked = stacked.transpose(-1, -2)
    return [one for whole in stacked for one in whole.split(layout.outputs, dim=0)]


def join(maps: Sequence[Tensor], context: Context, *, fused: bool = True) -> Tensor:
    """The inverse of `split`: a tensor of ``context.shape``."""
    import torch

    shape = context.shape
    if not maps:
        return context.base.new_zeros(shape)
    each = len(_layout(None, context, fused).outputs)
    wholes = [torch.cat(list(maps[start : start + each])) for start in range(0, len(maps), each)]
    if _layout(None, context, fused).transposed:
        wholes = [whole.transpose(-1, -2) for whole in wholes]
    return torch.stack(wholes).reshape(shape)


def by_map(
    deltas: Sequence[Tensor],
    context: Context,
    merge: Callable[[list[Tensor], Tensor, int], Tensor],
    *,
    fused: bool = True,
) -> Tensor:
    """Merge map by map: ``merge(deltas [o, i] of each expert, base [o, i], number of the map)``."""
    base = split(context.base, context, fused=fused)
    own = [split(delta, context, fused=fused) for delta in deltas]
    return join([merge(list(maps), base[n], n) for n, maps in enumerate(zip(*own, strict=True))], context, fused=fused)


def changed(deltas: Sequence[Tensor], base: Tensor) -> list[int]:
    """Indices of the experts that changed this map: those with ||tau|| > 1e-12 ||theta_0||."""
    floor = 1e-12 * float(base.norm())
    return [number for number, delta in enumerate(deltas) if float(delta.norm()) > floor]


def _layout(values: Tensor | None, context: Context, fused: bool) -> MatrixLayout:
    shape = context.shape if values is None else tuple(values.shape)
    layout = context.layout or MatrixLayout(False, (shape[-2],))
    return layout if fused else MatrixLayout(layout.transposed, (sum(layout.outputs),))
