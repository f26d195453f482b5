"""Sparse patches of a linear map: what the entries that stay must be so that the outputs miss the others least."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROOM = 1 << 19
"""Numbers that the systems solved at a time may hold together: few enough for the processor's cache."""
_PIECE = 128
"""Rows of a system that are gathered at a time, from the diagonal on."""


def fitted(target: Tensor, moment: Tensor, mask: Tensor) -> Tensor:
    """For every row j the delta on its support S that solves H_SS delta_S = (target_j)_S, zero elsewhere.

    With target = Delta H it is the least-squares patch: min ||(delta - Delta) H^(1/2)|| over deltas on the support.

    Args:
        target: ``[o, i]`` float64.
        moment: H ``[i, i]`` float64, positive definite.
        mask: the supports ``[o, i]``, bool.
    """
    import torch

    patch = torch.zeros_like(target)
    if not bool(mask.any()):
        return patch
    if bool((mask == mask[:1]).all()):
        support = mask[0].nonzero().squeeze(1)
        factor = torch.linalg.cholesky(moment[support][:, support])
        patch[:, support] = torch.cholesky_solve(target[:, support].T, factor).T
        return patch
    sizes = mask.sum(1)
    order = sizes.argsort(stable=True)
    ascending = sizes[order].tolist()
    room = moment.new_empty(max(_ROOM, ascending[-1] ** 2))
    start = ascending.count(0)
    while start < len(ascending):
        stop = start + 1
        while stop < len(ascending) and (stop + 1 - start) * ascending[stop] ** 2 <= _ROOM:
            stop += 1
        rows = order[start:stop]
        patch[rows] = _solved(target[rows], moment, mask[rows], room)
        start = stop
    return patch


def _solved(target: Tensor, moment: Tensor, mask: Tensor, room: Tensor) -> Tensor:
    """The same of a few rows, each with entries; systems are filled up with ones to the largest one's size.

    Gathered and factored in ``room``: fresh memory for each would take as long as its Cholesky factor.
    """
    import torch

    sizes = mask.sum(1)
    count, wide = mask.shape[0], int(sizes.max())
    places = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)[:, :wide]
    upper, right = room[: count * wide**2].view(count, wide, wide), target.gather(1, places)
    _gather(upper, moment, places)
    if int(sizes.min()) < wide:
        real = mask.gather(1, places)
        upper.mul_(real.unsqueeze(2) & real.unsqueeze(1))
        upper.diagonal(dim1=1, dim2=2).add_((~real).to(moment.dtype))
        right = torch.where(real, right, 0.0)
    factors = upper.mT
    told = torch.empty(count, dtype=torch.int32, device=moment.device)
    torch.linalg.cholesky_ex(factors, check_errors=True, out=(factors, told))
    # two triangular solves: cholesky_solve copies every factor first
    half = torch.linalg.solve_triangular(factors, right.unsqueeze(2), upper=False)
    found = torch.linalg.solve_triangular(upper, half, upper=True).squeeze(2)
    return torch.zeros_like(target).scatter_(1, places, found)


def _gather(upper: Tensor, moment: Tensor, places: Tensor) -> None:
    """Set ``upper [n, s, s]`` to the submatrices of H at ``places [n, s]``; below the diagonal not all of it."""
    wide, firsts, flat = upper.shape[1], places * moment.shape[1], moment.reshape(-1)
    for start in range(0, wide, _PIECE):
        part = upper[:, start : start + _PIECE, start:]
        index = firsts[:, start : start + _PIECE].unsqueeze(2) + places[:, start:].unsqueeze(1)
        part.copy_(flat.index_select(0, index.view(-1)).view_as(part))


def inverse_factor(moment: Tensor) -> Tensor:
    """The upper triangular R with R^T R = H^-1, of a positive definite H ``[i, i]``.

    Read from the far end, H = U U^T with U upper triangular, and R = U^-1.
    """
    import torch

    upper = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse
