"""Sparse patches of a linear map: what the entries that stay must be so that the outputs miss the others least."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROOM = 1 << 24
"""Numbers that the systems solved at a time may hold together."""


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
    start = int((sizes == 0).sum())
    while start < order.numel():
        stop = start + 1
        while stop < order.numel() and (stop + 1 - start) * int(sizes[order[stop]]) ** 2 <= _ROOM:
            stop += 1
        rows = order[start:stop]
        patch[rows] = _solved(target[rows], moment, mask[rows])
        start = stop
    return patch


def _solved(target: Tensor, moment: Tensor, mask: Tensor) -> Tensor:
    """The same of a few rows, each with entries; systems are filled up with ones to the largest one's size."""
    import torch

    wide = int(mask.sum(1).max())
    places = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)[:, :wide]
    real = mask.gather(1, places)
    both = real.unsqueeze(2) & real.unsqueeze(1)
    systems = torch.where(both, moment[places.unsqueeze(2), places.unsqueeze(1)], 0.0)
    systems.diagonal(dim1=1, dim2=2).add_((~real).to(moment.dtype))
    right = torch.where(real, target.gather(1, places), 0.0).unsqueeze(2)
    found = torch.cholesky_solve(right, torch.linalg.cholesky(systems)).squeeze(2)
    return torch.zeros_like(target).scatter_(1, places, torch.where(real, found, 0.0))


def inverse_factor(moment: Tensor) -> Tensor:
    """The upper triangular R with R^T R = H^-1, of a positive definite H ``[i, i]``.

    Read from the far end, H = U U^T with U upper triangular, and R = U^-1.
    """
    import torch

    upper = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse
