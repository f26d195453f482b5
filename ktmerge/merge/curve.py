"""Merging back towards the base by regression: one trust a."""

from __future__ import annotations

from collections.abc import Sequence
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
