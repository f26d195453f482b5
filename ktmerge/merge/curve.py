"""Merging back towards the base by regression: one trust a, and all of its values for one decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.merge.covariance import Covariance, total

if TYPE_CHECKING:
    from torch import Tensor


def with_priors(
    upstream: Covariance, downstream: Sequence[Covariance], prior_u: float, prior_d: float
) -> tuple[Covariance, list[Covariance]]:
    """C_u + prior_u m I and C_t + prior_d m I, m being the mean variance of upstream and downstream inputs together.

    In a direction that no sample has, M is then a prior_d / ((1 - a) prior_u + a prior_d) of the delta: a of it when
    the priors are equal, less when ``prior_u`` is larger.
    """
    mean = sum(one.trace() / one.inputs for one in downstream) / len(downstream)
    unit = (mean + upstream.trace() / upstream.inputs) / 2 or 1.0
    return upstream.ridged(prior_u * unit), [one.ridged(prior_d * unit) for one in downstream]


def back(
    deltas: Sequence[Tensor],
    shares: Sequence[float],
    upstream: Covariance,
    downstream: Sequence[Covariance],
    a: float,
) -> Tensor:
    """M = a D ((1-a) C_u + a C_d)^-1 with D = sum_t w_t tau_t C_t and C_d = sum_t w_t C_t; float64 ``[o, i]``.

    It minimises (1-a) ||M C_u^(1/2)||^2 + a sum_t w_t ||(M - tau_t) C_t^(1/2)||^2.
    """
    target = sum(
        (one.times(delta.double() * share) for one, delta, share in zip(downstream, deltas, shares, strict=True)),
        0 * deltas[0].double(),
    )
    both = total([upstream, *downstream], [1 - a, *(a * share for share in shares)])
    return both.solve(target * a)


@dataclass(frozen=True)
class Path:
    """The merges of one delta for every a.

    Attributes:
        delta: tau ``[o, i]``.
        responses: B = tau C_u V ``[o, i]`` float64.
        ratios: mu ``[i]``: downstream over upstream energy of each direction.
        directions: V ``[i, i]``: V^T C_u V = I, V^T C_d V = diag(mu).
    """

    delta: Tensor
    responses: Tensor
    ratios: Tensor
    directions: Tensor

    def at(self, a: float) -> Tensor:
        """(B diag(a mu / ((1-a) + a mu))) V^T, shaped and typed like the delta; a = 1 is the delta itself, 0 zeros."""
        if a == 1:
            return self.delta
        if a == 0:
            return self.delta * 0
        passed = a * self.ratios / ((1 - a) + a * self.ratios)
        return ((self.responses * passed) @ self.directions.T).to(self.delta.dtype)


def a_path(delta: Tensor, upstream: Covariance, downstream: Covariance) -> Path:
    """Decompose once, so that every a costs one product: C_d v = mu C_u v (Cholesky of C_u, which must be definite)."""
    import torch

    lower = torch.linalg.cholesky(upstream.dense())
    half = torch.linalg.solve_triangular(lower, downstream.dense(), upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
    ratios, turn = torch.linalg.eigh((whitened + whitened.T) / 2)
    directions = torch.linalg.solve_triangular(lower.T, turn, upper=True)
    responses = upstream.times(delta.double()) @ directions
    return Path(delta, responses, ratios.clamp(min=0), directions)
