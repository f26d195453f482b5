"""The linear maps inside a tensor, as fp32 matrices with outputs as rows, and back. For stages of reach ``tensor``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.checkpoints.matrices import MatrixLayout
    from ktmerge.merge.stage import Context, Place


_NEAR = 40
"""Powers of two within which squares, sums of squares and their roots are safe in fp32."""


def split(values: Tensor, context: Context, *, fused: bool = True) -> list[Tensor]:
    """Views ``[o, i]`` of every linear map in ``values``: each of stacked experts, each of fused maps.

    Args:
        values: the whole tensor, shaped, of class matrix.
        context: of the stage.
        fused: whether maps that share a tensor (query, key and value; gate and up) are taken apart.
    """
    return maps_in(values, _layout(values.shape, context, fused))


def maps_in(values: Tensor, layout: MatrixLayout) -> list[Tensor]:
    """Views ``[o, i]`` of the maps that a layout tells of in ``values``."""
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
    layout = _layout(shape, context, fused)
    each = len(layout.outputs)
    wholes = [torch.cat(list(maps[start : start + each])) for start in range(0, len(maps), each)]
    if layout.transposed:
        wholes = [whole.transpose(-1, -2) for whole in wholes]
    return torch.stack(wholes).reshape(shape)


def by_map(
    deltas: Sequence[Tensor],
    context: Context,
    merge: Callable[[list[Tensor], Tensor, int], Tensor],
    *,
    fused: bool = True,
) -> Tensor:
    """Merge map by map: ``merge(deltas [o, i] of each expert, base [o, i], number of the map)``.

    Squares of huge changes leave fp32's range, and those of tiny ones vanish: a map with such changes is merged at
    another size, base and all, and brought back. The factor is a power of two, so that nothing is rounded.
    """
    from ktmerge.merge.decompositions import together

    base = split(context.base, context, fused=fused)
    own = [split(delta, context, fused=fused) for delta in deltas]

    def one(number: int) -> Tensor:
        maps = [delta[number] for delta in own]
        exponent = _far(maps, base[number])
        if not exponent:
            return merge(maps, base[number], number)
        near = [_times(values, -exponent) for values in maps]
        return _times(merge(near, _times(base[number], -exponent), number), exponent)

    size = max((8 * len(own) * values.numel() for values in base), default=0)
    return join(together(one, range(len(base)), size), context, fused=fused)


def _far(maps: Sequence[Tensor], base: Tensor) -> int:
    """The power of two of the largest change where its square is no good in fp32; 0 where all is well.

    It is, too, where the base is so much larger that the change is lost in it.
    """
    largest = max((float(values.abs().max()) for values in maps if values.numel()), default=0.0)
    if not 0 < largest < math.inf:
        return 0
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _NEAR or float(base.abs().max()) > math.ldexp(1.0, exponent + _NEAR):
        return 0
    return exponent


def _times(values: Tensor, exponent: int) -> Tensor:
    """``values`` times two to the power of ``exponent``, which may be beyond fp32's own range."""
    return (values.double() * math.ldexp(1.0, exponent)).float()


def row_size(place: Place) -> int:
    """How many elements go into one output of a linear map or convolution, or are an entry of an embedding or a vector.

    Of maps stored inputs first, those of all outputs, which lie among one another.
    """
    shape = place.shape
    if len(shape) < 2:
        return max(1, math.prod(shape))
    if place.tensor_class == "conv":
        return max(1, math.prod(shape[1:]))
    return max(1, shape[-1] * shape[-2] if _is_transposed(place) else shape[-1])


def _is_transposed(place: Place) -> bool:
    return place.tensor_class == "matrix" and place.layout is not None and place.layout.transposed


def row_views(values: Tensor, place: Place) -> list[Tensor]:
    """A piece of a tensor that begins and ends with a row as matrices ``[r, i]``; none if it is empty.

    A row is what `row_size` says, however it is stored; of maps stored inputs first there is a matrix for each.
    """
    if not values.numel():
        return []
    if len(place.shape) > 1 and _is_transposed(place):
        return list(values.reshape(-1, *place.shape[-2:]).transpose(1, 2))
    return [values.reshape(-1, row_size(place))]


def join_rows(rows: Sequence[Tensor], like: Tensor, place: Place) -> Tensor:
    """The inverse of `row_views`, shaped like ``like``."""
    import torch

    if not rows:
        return like
    if len(place.shape) > 1 and _is_transposed(place):
        return torch.stack([one.T for one in rows]).reshape(like.shape)
    return rows[0].reshape(like.shape)


def changed(deltas: Sequence[Tensor], base: Tensor) -> list[int]:
    """Indices of the experts that changed this map: those with ||tau|| > 1e-12 ||theta_0||."""
    floor = 1e-12 * float(base.norm())
    return [number for number, delta in enumerate(deltas) if float(delta.norm()) > floor]


def _layout(shape: Sequence[int], context: Context, fused: bool) -> MatrixLayout:
    from ktmerge.checkpoints.matrices import MatrixLayout

    layout = context.layout or MatrixLayout(False, (shape[-2],))
    return layout if fused else MatrixLayout(layout.transposed, (sum(layout.outputs),))
