"""Regression towards deltas whose own rows tell of their inputs: everything by way of products of those rows.

The deltas are never multiplied by anything but the matrix that their whole part in the answer comes to, and no second
copy of them is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ktmerge.merge.covariance import ZERO, gram
from ktmerge.merge.decompositions import eigh

if TYPE_CHECKING:
    from torch import Tensor

_SOUND = 1e-6
"""Eigenvalues above this share of the norm need no decomposition to divide by."""


@dataclass(frozen=True)
class Rows:
    """What one delta tau of weight alpha adds: C_t = F^T F / alpha, tau_t = F / (scale sqrt(alpha)).

    Attributes:
        factor: F = scale sqrt(alpha) tau ``[o, i]`` float64.
        target: 1 / (scale sqrt(alpha)), with which F F^T F is alpha tau C_t.
        start: share sqrt(alpha) / scale, with which F is the delta's part in the start.
    """

    factor: Tensor
    target: float
    start: float


def regressed(
    members: Sequence[Rows], others: Sequence[Tensor], solve: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """M ``[o, i]`` of D = sum_t alpha_t tau_t C_t, M_0 and C = sum_t alpha_t C_t + sum of F^T F of the others.

    Args:
        members: the deltas, at least one, of one shape.
        others: rows F ``[r, i]`` of what wants no change.
        solve: ``solve(C, D, M_0)``, given in any coordinates of the inputs; see `solver`.
    """
    import torch

    told = [*(one.factor for one in members), *others]
    (outputs, inputs), count = told[0].shape, sum(one.shape[0] for one in told)
    if count < inputs:
        inner = _inner(told)
        target, start = inner.new_zeros(2, outputs, count)
        for number, one in enumerate(members):
            part = slice(number * outputs, (number + 1) * outputs)
            target[:, part] = inner[part, part] * one.target
            start[:, part].diagonal().fill_(one.start)
        parts = torch.split(solve(inner, target, start), [one.shape[0] for one in told], 1)
        return _added(zip(parts, told, strict=True))
    if outputs >= inputs:
        moments = [gram(one) for one in told]
        common = sum(moments[1:], moments[0])
        identity = torch.eye(inputs, dtype=common.dtype, device=common.device)
        targets = torch.cat([moment * one.target for moment, one in zip(moments, members, strict=False)])
        starts = torch.cat([identity * one.start for one in members])
        turns = torch.split(solve(common, targets, starts), inputs)
        return _added((one.factor, turn) for one, turn in zip(members, turns, strict=True))
    common = gram(told[0])
    for rows in told[1:]:
        common += gram(rows)
    target = _added((gram(one.factor.T) * one.target, one.factor) for one in members)
    start = members[0].factor * members[0].start
    for one in members[1:]:
        start.add_(one.factor, alpha=one.start)
    return solve(common, target, start)


def _added(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the products."""
    total: Tensor | None = None
    for first, second in pairs:
        total = first @ second if total is None else total.addmm_(first, second)
    assert total is not None
    return total


def _inner(told: Sequence[Tensor]) -> Tensor:
    """F F^T of all rows one below the other, which are not copied together."""
    edges = [0, *accumulate(one.shape[0] for one in told)]
    inner = told[0].new_empty(edges[-1], edges[-1])
    for n, first in enumerate(told):
        own = slice(edges[n], edges[n + 1])
        inner[own, own] = gram(first.T)
        for m, second in enumerate(told[:n]):
            other = slice(edges[m], edges[m + 1])
            inner[own, other] = first @ second.T
            inner[other, own] = inner[own, other].T
    return inner


def solver(
    factors: Callable[[Tensor], Tensor], floor: float, ridge: float, *, whole: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """M_0 + (D - M_0 C) (C + ridge)^-1, or M_0 + [(D V)(f / lambda) - (M_0 V) f] V^T of C = V lambda V^T.

    By a Cholesky factor where that will do: a tenth of a decomposition's work.

    Args:
        factors: f of eigenvalues in descending order; eigenvectors whose eigenvalue is rounding are no part of V.
        floor: what every eigenvalue of C has to exceed for a factor without ridge.
        ridge: added to C, if it is above 0 and ``whole``.
        whole: f is 1, or lambda / (lambda + ridge), of all directions with an eigenvalue above the floor.
    """

    def solve(common: Tensor, target: Tensor, start: Tensor) -> Tensor:
        import torch

        lower = _factor(common, floor, ridge) if whole else None
        if lower is not None:
            aimed = target + ridge * start if ridge else target
            return torch.cholesky_solve(aimed.T, lower).T
        values, vectors = eigh(common)
        known = int((values <= ZERO * values[-1:].clamp(min=0)).sum())
        values, vectors = values[known:], vectors[:, known:]
        passed = factors(values.flip(0)).flip(0)
        coordinates = (target @ vectors) * (passed / values) - (start @ vectors) * passed
        return start + coordinates @ vectors.T

    return solve


def _factor(common: Tensor, floor: float, ridge: float) -> Tensor | None:
    """Of C + ridge; or None if, without ridge, C is near to losing a direction."""
    import torch

    moved = common.clone()
    moved.diagonal().add_(ridge or -max(floor, _SOUND * float(common.norm())))
    lower, failed = torch.linalg.cholesky_ex(moved, check_errors=bool(ridge))
    if not ridge and not int(failed):
        lower, failed = torch.linalg.cholesky_ex(common)
    return None if int(failed) else lower
