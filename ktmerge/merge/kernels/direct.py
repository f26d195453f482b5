"""Blends from memory to memory: the same arithmetic as `ktmerge.merge.kernels.compiled`, without copies on the way.

A sweep blends the same models over and over, so that base and experts lie in memory and the result belongs into the
parameters of a loaded model. A change that is a plain weighted sum of one expert's delta is made in a single loop,
which waits for memory only.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.codes import BLOCK, F32, FINE, GIVEN, INPUT_NOT_FINITE, OVERFLOW, SUM
from ktmerge.merge.kernels.combining import clamp, conclude, copy, shrink, take_in
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.conversion import load, store
from ktmerge.merge.kernels.randomness import random_words
from ktmerge.merge.kernels.settling import scale_and_add, settle_base, settle_expert, sum_up
from ktmerge.merge.kernels.transforming import count_kept, subtract, transform

_U32, _F32 = np.uint32, np.float32
_EXPONENT = np.uint32(0x7F800000)
_INFINITY = np.float32(np.inf)
_ALL = 1 << 60
"""Elements of an array that is all memory: addresses are its indices."""


@compiled
def _worst(patterns):
    """The largest exponent."""
    worst = _U32(0)
    for i in range(patterns.size):
        worst = _U32(max(worst, _U32(patterns[i] & _EXPONENT)))
    return worst


@compiled
def _row(kind, memory32, place, buffer):
    """Elements of a row: where they are, or for another type than fp32 where `_load` puts them."""
    return memory32[place : place + buffer.size] if kind == F32 else buffer


@compiled
def _load(kind, memory16, memory32, place, row):
    """Whether one is not finite."""
    return _worst(row) == _EXPONENT if kind == F32 else load(kind, memory16, memory32, place, row)


@compiled
def _one_delta(base, expert, weight, lambda_, merged, out):
    """``theta_0 + lambda w tau`` and its settling, as the functions of `settling` do it step by step."""
    for i in range(out.size):
        own, theirs = base[i], expert[i]
        delta = theirs - own
        scaled = delta * weight * lambda_
        value = own + scaled
        value = theirs if scaled == delta else value
        merged[i] = scaled
        out[i] = own if scaled == _F32(0) else value


@compiled
def _merge(
    memory16, memory32, kinds, places, start, first, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, fallback, kept, own, theta, delta, lanes, words, v, share, m,
):  # fmt: skip
    """The merged delta of the elements of the piece from ``first`` on into ``m``; whether an input is not finite."""
    n = m.size
    for t in range(kept.size):
        d = delta[t][:n]
        other = _row(kinds[t + 1], memory32, places[t + 1] + first, theta[t + 1][:n])
        if _load(kinds[t + 1], memory16, memory32, places[t + 1] + first, other):
            return True
        subtract(other.view(np.float32), own, d)
        transform(steps, d, start + first, t, floors, leasts, spans, tops, keys, cuts, factors, lanes, words)
        if steps.size:
            kept[t] += count_kept(d.view(np.uint32))
        take_in(combine, t, d, rates[1][t], v, share, m)
    if combine == GIVEN:
        place = places[kept.size + 1] + first
        copy(memory32[place : place + n].view(np.float32), m)
    else:
        conclude(combine, counted, rates, fallback, delta, v, share, m)
    return False


@compiled
def _direct(
    memory16, memory32, kinds, places, count, start, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, ends, kind, stochastic, round_key, target, out, leave, sums, kept,
    halves, theta, delta, lanes, words, vote, share, merged, values,
):  # fmt: skip
    number = kept.size
    fallback, factor, limit, lambda_ = ends[0], ends[1], ends[2], ends[3]
    plain_sum = combine == SUM and number == 1 and steps.size == 0 and factor == _F32(1) and limit == _INFINITY
    single = plain_sum and leave == 0
    status = int64(FINE)
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        m = merged[:n]
        own = _row(kinds[0], memory32, places[0] + first, theta[0][:n])
        # What is stored as it is computed is computed in its place.
        plain = kind == F32 and target == F32
        patterns = memory32[out + first : out + first + n] if plain else values[:n].view(np.uint32)
        r = patterns.view(np.float32)
        theta0 = own.view(np.float32)
        if _load(kinds[0], memory16, memory32, places[0] + first, own):
            return int64(INPUT_NOT_FINITE)
        if single:
            other = _row(kinds[1], memory32, places[1] + first, theta[1][:n])
            if _load(kinds[1], memory16, memory32, places[1] + first, other):
                return int64(INPUT_NOT_FINITE)
            _one_delta(theta0, other.view(np.float32), rates[1][0], lambda_, m, r)
        else:
            if _merge(
                memory16, memory32, kinds, places, start, first, steps, floors, leasts, spans, tops, keys, cuts,
                factors, combine, counted, rates, fallback, kept, theta0, theta, delta, lanes, words, vote[:n],
                share[:n], m,
            ):  # fmt: skip
                return int64(INPUT_NOT_FINITE)
            if factor != _F32(1):
                shrink(m, factor)
            if limit < _INFINITY:
                clamp(m, limit)
            if leave:
                copy(m, memory32[leave + first : leave + first + n].view(np.float32))
            scale_and_add(m, lambda_, theta0, r)
            for t in range(number - 1, -1, -1):
                other = _row(kinds[t + 1], memory32, places[t + 1] + first, theta[t + 1][:n])
                settle_expert(m, other.view(np.float32), theta0, r)
            settle_base(m, theta0, r)
        if plain:
            if _worst(patterns) == _EXPONENT:
                status = int64(OVERFLOW)
            sum_up(theta0, m, r, sums)
            continue
        if stochastic:
            random_words(round_key, start + first, lanes, words[: (n + 3) // 4 * 4])
        narrow = target != F32
        stored = vote[:n].view(np.uint32) if narrow else memory32[out + first : out + first + n]
        to16 = memory16[out + first : out + first + n] if narrow else halves[:n]
        if store(kind, stochastic, patterns, words[:n], to16, stored, stored):
            status = int64(OVERFLOW)
        sum_up(theta0, m, stored.view(np.float32), sums)
    return status


def direct(
    memory16, memory32, kinds, places, number, count, start, step_count, steps, floors, leasts, spans, tops, keys, cuts,
    factors, combine, counted, rates, ends, kind, stochastic, round_key, target, out, leave, sums, kept, scratch,
):  # fmt: skip
    """Blend ``count`` elements from memory to memory; FINE, INPUT_NOT_FINITE or OVERFLOW.

    As `blend`, but for where things are. ``memory16`` and ``memory32`` are the address 0. ``places`` int64 ``[N + 2]``
    are the first elements of base, experts and, if ``combine`` is GIVEN, of the merged delta before factor, limit and
    lambda in fp32: their addresses divided by the width of their kind; ``out`` likewise is the first element written,
    of the type ``target``: that of ``kind``, or F32 for its values; ``leave`` that of a place for the merged delta, or
    0. ``scratch`` holds ``BLOCK * (2 N + 8)`` words. Nothing is promised of what is written unless it is FINE.
    """
    per_step = (step_count, number)
    work = carray(scratch, (2 * number + 8, BLOCK))
    floats = work.view(np.float32)
    return _direct(
        carray(memory16, (_ALL,)), carray(memory32, (_ALL,)), carray(kinds, (number + 1,)),
        carray(places, (number + 2,)), count, start,
        carray(steps, (step_count,)), carray(floors, per_step), carray(leasts, per_step), carray(spans, per_step),
        carray(tops, per_step), carray(keys, per_step), carray(cuts, per_step), carray(factors, per_step),
        combine, counted, carray(rates, (3, number)), carray(ends, (4,)), kind, stochastic, round_key, target, out,
        leave, carray(sums, (4,)), carray(kept, (number,)), work[2 * number + 7].view(np.uint16),
        work[: number + 1], floats[number + 1 : 2 * number + 1], work[2 * number + 1], work[2 * number + 6],
        floats[2 * number + 2], floats[2 * number + 3], floats[2 * number + 4], floats[2 * number + 5],
    )  # fmt: skip
