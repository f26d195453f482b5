"""One expert's delta through its transforms. Compiled by numba; see `ktmerge.merge.kernels.compiled`."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64, uint16

from ktmerge.merge.kernels.bits import nothing
from ktmerge.merge.kernels.codes import DROP, TRIM
from ktmerge.merge.kernels.compiler import compiled, inlined
from ktmerge.merge.kernels.gathering import collect
from ktmerge.merge.kernels.randomness import draw, hash_of

_U32, _U64 = np.uint32, np.uint64
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ONE = np.uint32(1)
_ZERO = np.float32(0)
_LAST = np.uint64(2**64 - 1)


@compiled
def subtract(expert, base, out):
    for i in range(out.size):
        out[i] = expert[i] - base[i]


@compiled
def _keep_within(delta, floor, span):
    """Zero what has a magnitude pattern outside ``[floor, floor + span)``."""
    patterns, none = delta.view(np.uint32), nothing()
    for i in range(delta.size):
        pattern = _U32(patterns[i] ^ none)  # as `as_it_was`
        patterns[i] = pattern if _U32(_U32(pattern & _MAGNITUDE) - floor) < span else _U32(0)


@compiled
def _drop_hashed(delta, tied, first, last, key, start):
    """Zero those of the elements ``tied`` whose hash is from ``first`` to ``last``."""
    for j in range(tied.size):
        if _U64(hash_of(key, _U64(start) + _U64(tied[j])) - first) <= _U64(last - first):
            delta[tied[j]] = _ZERO


@compiled
def _drop(delta, masks, factor):
    for i in range(delta.size):
        delta[i] = delta[i] * factor if masks[i] != uint16(0) else _ZERO


@compiled
def _apply(step, d, start, floor, least, span, top, key, cut, factor, words):
    if step == TRIM:
        _keep_within(d, floor, span)
        if least != _U64(0):
            tied = collect(d.view(np.uint32), floor, _U32(0), words)
            _drop_hashed(d, words[:tied], _U64(0), _U64(least - _U64(1)), key, start)
        if top != _U64(0):
            tied = collect(d.view(np.uint32), _U32(_U32(floor + span) - _ONE), _U32(0), words)
            _drop_hashed(d, words[:tied], top, _LAST, key, start)
    elif step == DROP:
        _drop(d, draw(key, _U64(start), d.size, cut, words), factor)


@compiled
def count_kept(patterns):
    """How many are neither zero nor minus zero."""
    count = _U32(0)
    for i in range(patterns.size):
        count = _U32(count + (_ONE if _U32(patterns[i] & _MAGNITUDE) != _U32(0) else _U32(0)))
    return int64(count)


@inlined
def steps_at(number, count, steps, floors, leasts, spans, tops, keys, cuts, factors):
    """The transforms' codes, and their numbers by transform and expert."""
    shape = (count, number)
    return (
        carray(steps, (count,)), carray(floors, shape), carray(leasts, shape), carray(spans, shape),
        carray(tops, shape), carray(keys, shape), carray(cuts, shape), carray(factors, shape),
    )  # fmt: skip


@inlined
def transform(steps, d, start, t, words):
    """Take the delta of expert ``t``, whose first element is ``start``, through all transforms."""
    codes, floors, leasts, spans, tops, keys, cuts, factors = steps
    for s in range(codes.size):
        _apply(
            codes[s], d, start, floors[s, t], leasts[s, t], spans[s, t], tops[s, t], keys[s, t], cuts[s, t],
            factors[s, t], words,
        )  # fmt: skip
