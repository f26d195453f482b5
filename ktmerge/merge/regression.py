"""One solver for merging by regression: the map that answers each expert's inputs as that expert does.

RegMean, its data-free relatives (ACTMat, WUDI's closed form, SWUDI) and merging back to the base differ only in the
covariances they put in and in how they treat directions that no input excites much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ktmerge.merge.covariance import Covariance, Frame, gram, total

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
    import torch

    alphas = [1.0] * len(members) if weights is None else list(weights)
    deltas = [member.double() for member in members]
    weighted = [delta * alpha for delta, alpha in zip(deltas, alphas, strict=True)]
    added = torch.stack(weighted).sum(0)
    share = {"sum": 1.0, "mean": 1 / sum(alphas), "zero": 0.0}[init]
    start = share * added
    common = total([*covariances, *([base] if base else [])], [*alphas, *([1.0] if base else [])])
    mean = common.trace() / common.inputs
    if not mean > 0:
        return start
    ridge = filter.strength * mean if filter.shape == "tikhonov" else 0.0
    least = float(common.diagonal.min()) + ridge
    unit = sum(alpha * one.trace() for one, alpha in zip(covariances, alphas, strict=True)) / sum(alphas)
    if filter.rank == "all" and filter.shape != "exp":
        target = _target(weighted, covariances)
        if least > _DEFINITE * mean:
            return start + common.ridged(ridge).solve(target - common.times(start))
        found = None if ridge else common.towards(target, start, _FLOOR * unit)
        if found is not None:
            return found
    frame = common.frame()
    passed = filter.of(frame.eigenvalues, unit, mean, common.inputs)
    if frame.rows is not None and all(one.scale for one in covariances):
        begun, aimed = _by_rows(frame, covariances, alphas)
        begun *= share
    else:
        begun, aimed = frame.onto(start), frame.onto(_target(weighted, covariances))
    return start + frame.back(aimed * (passed / frame.eigenvalues) - begun * passed)


def _target(weighted: Sequence[Tensor], covariances: Sequence[Covariance]) -> Tensor:
    """D = sum_t alpha_t tau_t C_t, ``[o, i]``."""
    target = covariances[0].times(weighted[0])
    for delta, one in zip(weighted[1:], covariances[1:], strict=True):
        target = target + one.times(delta)
    return target


def _by_rows(frame: Frame, covariances: Sequence[Covariance], alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """sum_t alpha_t tau_t V and D V ``[o, r]`` of a frame whose rows are all s_t sqrt(alpha_t) tau_t, one by one.

    tau_t V = F_t V / s_t, and D V = sum_t alpha_t / s_t (F_t F_t^T) F_t V.
    """
    outputs, start = covariances[0].factor.shape[0], 0
    begun = frame.turn.new_zeros(outputs, frame.eigenvalues.numel())
    aimed = begun.clone()
    for one, alpha in zip(covariances, alphas, strict=True):
        if one.scale is None or not alpha:
            continue
        own = frame.of_rows(slice(start, start + outputs)) * (alpha**0.5 / one.scale)
        begun += own
        aimed += gram(one.factor.T) @ own
        start += outputs
    return begun, aimed
