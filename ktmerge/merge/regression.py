"""One solver for merging by regression: the map that answers each expert's inputs as that expert does.

RegMean, its data-free relatives (ACTMat, WUDI's closed form, SWUDI) and merging back to the base differ only in the
covariances they put in and in how they treat directions that no input excites much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ktmerge.merge.covariance import Covariance, total
from ktmerge.merge.gramian import Rows, regressed, solver

if TYPE_CHECKING:
    from torch import Tensor

Shape = Literal["none", "exp", "tikhonov"]
Rank = Literal["all", "fraction", "energy", "nuclear", "stable", "participation"]
Init = Literal["mean", "sum", "zero"]

_DEFINITE = 1e-10
"""A diagonal of this share of the mean variance makes a Cholesky factor safe, and a decomposition needless."""

_EQUAL = 1e-9
"""Eigenvalues that differ by no more than this share may be equal but for rounding."""

_FLOOR = 1e-8
"""Directions with less than this share of a task's whole energy are left at the start (arXiv:2606.07289)."""


@dataclass(frozen=True)
class Filter:
    """How far each eigenvector of the covariance goes from the start to the regression: f in [0, 1].

    Attributes:
        shape: ``none``: all the way; ``exp``: 1 - exp(-lambda T), a gradient flow stopped at time T, lambda in units of
            one task's trace; ``tikhonov``: lambda / (lambda + strength * mean lambda).
        time: T of ``exp``.
        strength: of ``tikhonov``.
        rank: which of the largest eigenvalues take part at all: ``all``; ``fraction`` of the inputs; the fewest that
            hold a share of sum lambda (``energy``) or of sum sqrt(lambda) (``nuclear``); as many as the ``stable`` rank
            sum lambda / lambda_1, or as the ``participation`` of sqrt(lambda), (sum sqrt(lambda))^2 / sum lambda.
        keep: the fraction or share.
    """

    shape: Shape = "none"
    time: float = 0.0
    strength: float = 0.0
    rank: Rank = "all"
    keep: float = 1.0

    def of(self, eigenvalues: Tensor, unit: float, mean: float, inputs: int) -> Tensor:
        """f of eigenvalues in descending order, given one task's trace and the mean of all i of them."""
        import torch

        passed = torch.ones_like(eigenvalues)
        if self.shape == "exp":
            passed = -torch.expm1(-eigenvalues / unit * self.time)
        elif self.shape == "tikhonov":
            passed = eigenvalues / (eigenvalues + self.strength * mean)
        passed[leading(eigenvalues, self.rank, self.keep, inputs) :] = 0
        return torch.where(eigenvalues > _FLOOR * unit, passed, 0.0)


def leading(eigenvalues: Tensor, rank: Rank, keep: float, inputs: int) -> int:
    """How many of the eigenvalues, in descending order, a rank rule takes; see `Filter`.

    Those that equal the last one are taken, too: which eigenvectors of equal eigenvalues come first is arbitrary.
    """
    if rank == "all" or not eigenvalues.numel():
        return eigenvalues.numel()
    count = min(_count(eigenvalues, rank, keep, inputs), eigenvalues.numel())
    return int((eigenvalues >= eigenvalues[count - 1] * (1 - _EQUAL)).sum()) if count else 0


def _count(eigenvalues: Tensor, rank: Rank, keep: float, inputs: int) -> int:
    roots = eigenvalues.sqrt()
    if rank == "fraction":
        return _whole(keep * inputs)
    if rank in ("energy", "nuclear"):
        parts = (eigenvalues if rank == "energy" else roots).cumsum(0)
        return int((parts < keep * parts[-1] * (1 - 1e-12)).sum()) + (keep > 0)
    if rank == "stable":
        return _whole(float(eigenvalues.sum() / eigenvalues[0]))
    return _whole(float(roots.sum() ** 2 / eigenvalues.sum()))


def _whole(number: float) -> int:
    """The next whole number up; what is one but for rounding stays."""
    return math.ceil(number * (1 - _EQUAL))


def spectral_regmean(
    members: Sequence[Tensor],
    covariances: Sequence[Covariance],
    filter: Filter,
    init: Init,
    *,
    weights: Sequence[float] | None = None,
    base: Covariance | None = None,
) -> Tensor:
    """M = M_0 + [(D V)(f / lambda) - (M_0 V) f] V^T (arXiv:2212.09849, arXiv:2503.08099, arXiv:2606.07289).

    D = sum_t alpha_t tau_t C_t and C = sum_t alpha_t C_t (+ C_0) = V lambda V^T: with f = 1, M minimises
    sum_t alpha_t ||(M - tau_t) C_t^(1/2)||^2 + ||M C_0^(1/2)||^2, and stays at M_0 where C is zero.

    Args:
        members: deltas tau_t ``[o, i]``.
        covariances: C_t of each.
        filter: f.
        init: M_0: the weighted mean of the deltas, their weighted sum, or zero.
        weights: alpha_t of 0 or more; all 1 if not given.
        base: C_0, weight included: the base taking part as a member whose delta is zero.

    Returns:
        ``[o, i]`` float64.
    """
    alphas = [1.0] * len(members) if weights is None else list(weights)
    share = {"sum": 1.0, "mean": 1 / sum(alphas), "zero": 0.0}[init]
    traces = sum(alpha * one.trace() for one, alpha in zip(covariances, alphas, strict=True))
    unit, inputs = traces / sum(alphas), covariances[0].inputs
    whole = filter.rank == "all" and filter.shape != "exp"
    strength = filter.strength if filter.shape == "tikhonov" else 0.0
    others = [base] if base else []

    if all(one.scale for one in covariances) and not (base and bool(base.diagonal.any())):
        mean = (traces + sum(one.trace() for one in others)) / inputs
        ridge = strength * mean if strength > _DEFINITE else 0.0
        solve = solver(lambda values: filter.of(values, unit, mean, inputs), _FLOOR * unit, ridge, whole=whole)
        return regressed(_rows(covariances, alphas, share), [one.factor for one in others], solve)

    start, target = _sums(members, covariances, alphas)
    start *= share
    common = total([*covariances, *others], [*alphas, *(1.0 for _ in others)])
    mean = common.trace() / inputs
    if not mean > 0:
        return start
    if whole and float(common.diagonal.min()) + strength * mean > _DEFINITE * mean:
        return start + common.ridged(strength * mean).solve(target - common.times(start))
    frame = common.frame()
    passed = filter.of(frame.eigenvalues, unit, mean, inputs)
    return start + frame.back(frame.onto(target) * (passed / frame.eigenvalues) - frame.onto(start) * passed)


def _rows(covariances: Sequence[Covariance], alphas: Sequence[float], share: float) -> list[Rows]:
    """The members of weight above 0, of covariances that are their deltas' own."""
    return [
        Rows(one.factor * alpha**0.5 if alpha != 1 else one.factor, 1 / (one.scale * alpha**0.5),
             share * alpha**0.5 / one.scale)
        for one, alpha in zip(covariances, alphas, strict=True) if one.scale and alpha > 0
    ]  # fmt: skip


def _sums(
    members: Sequence[Tensor], covariances: Sequence[Covariance], alphas: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """sum_t alpha_t tau_t and D = sum_t alpha_t tau_t C_t, ``[o, i]`` each, with one delta in float64 at a time."""
    added, target = members[0].double().new_zeros(2, *members[0].shape)
    for member, one, alpha in zip(members, covariances, alphas, strict=True):
        weighted = member.double() * alpha
        added += weighted
        target += one.times(weighted)
    return added, target
