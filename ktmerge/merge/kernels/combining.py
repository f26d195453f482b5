"""Deltas of all experts to one merged delta. Compiled by numba; see `ktmerge.merge.kernels.compiled`."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np

from ktmerge.merge.kernels.bits import as_it_was, nothing
from ktmerge.merge.kernels.codes import ELECT_LARGEST, ELECT_MEAN, LARGEST, SUM
from ktmerge.merge.kernels.compiler import compiled, inlined

_F32 = np.float32
_ZERO = np.float32(0)


@compiled
def _scale_into(delta, weight, total):
    for i in range(total.size):
        total[i] = delta[i] * weight


@compiled
def _add_into(delta, weight, total):
    for i in range(total.size):
        total[i] += delta[i] * weight


@compiled
def _sign_into(delta, sign):
    for i in range(sign.size):
        sign[i] = _F32(1) if delta[i] > _ZERO else (_F32(-1) if delta[i] < _ZERO else _ZERO)


@compiled
def _break_ties(vote, fallback):
    none = nothing()
    for i in range(vote.size):
        own = as_it_was(vote[i], none)
        vote[i] = fallback if own == _ZERO else own


@compiled
def _agree_first(delta, vote, weight, part, total, share):
    for i in range(total.size):
        agrees = ((delta[i] > _ZERO) & (vote[i] > _ZERO)) | ((delta[i] < _ZERO) & (vote[i] < _ZERO))
        total[i] = (delta[i] if agrees else _ZERO) * weight
        share[i] = (_F32(1) if agrees else _ZERO) * part


@compiled
def _agree_next(delta, vote, weight, part, total, share):
    for i in range(total.size):
        agrees = ((delta[i] > _ZERO) & (vote[i] > _ZERO)) | ((delta[i] < _ZERO) & (vote[i] < _ZERO))
        total[i] += (delta[i] if agrees else _ZERO) * weight
        share[i] += (_F32(1) if agrees else _ZERO) * part


@compiled
def _agree_most(delta, vote, total):
    """The larger of ``total`` and of the delta, if that has the elected sign; with that sign."""
    for i in range(total.size):
        above, below = max(total[i], delta[i]), min(total[i], delta[i])
        total[i] = above if vote[i] > _ZERO else (below if vote[i] < _ZERO else _ZERO)


@compiled
def copy(values, out):
    for i in range(out.size):
        out[i] = values[i]


@compiled
def _extend(delta, high, low):
    none = nothing()
    for i in range(high.size):
        high[i] = max(as_it_was(high[i], none), delta[i])
        low[i] = min(as_it_was(low[i], none), delta[i])


@compiled
def _pick(high, low, total):
    """Of the highest and the lowest the larger in magnitude, into the highest; the sign of the total between equals."""
    for i in range(high.size):
        up, down, mass = high[i], low[i], total[i]
        even = up if mass > _ZERO else (down if mass < _ZERO else _ZERO)
        high[i] = up if up > -down else (down if up < -down else even)


@compiled
def shrink(merged, factor):
    for i in range(merged.size):
        merged[i] = merged[i] * factor


@compiled
def clamp(merged, limit):
    for i in range(merged.size):
        merged[i] = min(max(merged[i], -limit), limit)


@compiled
def _divide(total, share):
    for i in range(total.size):
        divisor = share[i] if share[i] > _ZERO else _F32(1)
        total[i] = total[i] / divisor if share[i] > _ZERO else _ZERO


@compiled
def _elect(combine, counted, votes, weights, shares, fallback, delta, vote, share, merged):
    """The experts' deltas that have the elected sign: their weighted mean or sum, or the largest of them."""
    n = merged.size
    for t in range(votes.size):
        d = delta[t][:n]
        if counted:
            _sign_into(d, share)
            d = share
        if t == 0:
            _scale_into(d, votes[0], vote)
        else:
            _add_into(d, votes[t], vote)
    if fallback != _ZERO:
        _break_ties(vote, fallback)
    if combine == ELECT_LARGEST:
        merged[:] = _ZERO
        for t in range(votes.size):
            _agree_most(delta[t][:n], vote, merged)
        return
    _agree_first(delta[0][:n], vote, weights[0], shares[0], merged, share)
    for t in range(1, votes.size):
        _agree_next(delta[t][:n], vote, weights[t], shares[t], merged, share)
    if combine == ELECT_MEAN:
        _divide(merged, share)


@inlined
def take_in(combine, t, d, weight, vote, share, merged):
    """What expert ``t`` adds to a sum or to the largest; an election needs all deltas first."""
    if combine == LARGEST:
        shrink(d, weight)
        if t == 0:
            copy(d, merged)
            copy(d, share)
            copy(d, vote)
        else:
            _extend(d, merged, share)
            _add_into(d, _F32(1), vote)
    elif combine == SUM:
        if t == 0:
            _scale_into(d, weight, merged)
        else:
            _add_into(d, weight, merged)


@inlined
def conclude(combine, counted, rates, fallback, delta, vote, share, merged):
    """The merged delta, when all experts were taken in; ``rates`` are votes, weights and shares."""
    if combine == LARGEST:
        _pick(merged, share, vote)
    elif combine != SUM:
        _elect(combine, counted, rates[0], rates[1], rates[2], fallback, delta, vote, share, merged)
