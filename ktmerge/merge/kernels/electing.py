"""An election among the deltas of a few bf16 rows after one transform, TIES and its kin: few loops over many numbers.

The same arithmetic as `ktmerge.merge.kernels.compiled`, number by number; what that does in a loop each is done in
registers here: one loop an expert up to its transformed delta, and one for all from the election to what is stored.

Compiled by numba.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.np.unsafe.ndarray import to_fixed_tuple
from numba.types import int64, uint16

from ktmerge.merge.kernels.bits import as_bits, as_float
from ktmerge.merge.kernels.codes import BLOCK, FINE, INPUT_NOT_FINITE, MOST, NOTHING, OVERFLOW, TRIM, UNREADABLE, WINDOW
from ktmerge.merge.kernels.compiler import compiled, inlined
from ktmerge.merge.kernels.conversion import EXPONENT, load_bf16
from ktmerge.merge.kernels.files import fetch_all, rows_at
from ktmerge.merge.kernels.randomness import draw, judge
from ktmerge.merge.kernels.settling import sum_up
from ktmerge.merge.kernels.transforming import steps_at
from ktmerge.merge.kernels.trimming import trim

_U32, _U64, _F32 = np.uint32, np.uint64, np.float32
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LARGEST16 = np.uint32(0x7F7F0000)
_SIGN = np.uint32(0x80000000)
_ONE = np.uint32(1)
_ZERO = np.float32(0)


@compiled
def _take(raw, own, theirs, delta):
    """An expert's patterns, and those of its delta; the largest exponent of the former."""
    worst = _U32(0)
    for i in range(delta.size):
        pattern = _U32(_U32(raw[i]) << _U32(16))
        worst = _U32(max(worst, _U32(pattern & EXPONENT)))
        theirs[i] = pattern
        delta[i] = as_bits(as_float(pattern) - as_float(own[i]))
    return worst


@compiled
def _drop(raw, own, masks, factor, theirs, delta):
    """An expert's patterns, and those of its delta ``factor`` times as large where the mask is not zero; the largest
    exponent of the former, and how many of the latter are not zero."""
    worst, kept = _U32(0), _U32(0)
    for i in range(delta.size):
        pattern = _U32(_U32(raw[i]) << _U32(16))
        worst = _U32(max(worst, _U32(pattern & EXPONENT)))
        theirs[i] = pattern
        scaled = (as_float(pattern) - as_float(own[i])) * factor
        bits = as_bits(scaled if masks[i] != uint16(0) else _ZERO)
        delta[i] = bits
        kept = _U32(kept + (_ONE if _U32(bits & _MAGNITUDE) != _U32(0) else _U32(0)))
    return worst, kept


@compiled
def _mask(delta, tied, masks):
    for j in range(tied.size):
        delta[tied[j]] &= masks[j]


def _election(number: int) -> Any:
    """From the deltas of so many experts to what is stored; the compiler has no loop over experts left."""

    @compiled
    def elect(work, votes, weights, shares, fallback, mean, lambda_, out):
        """Rows of ``work``: the base's patterns, the experts', their deltas', the merged delta's, what was stored. The
        largest magnitude before rounding."""
        largest = _U32(0)
        for i in range(out.size):
            at = _U64(i)
            own = as_float(work[at])
            vote = as_float(work[_U64((number + 1) * BLOCK) + at]) * votes[0]
            for t in range(1, number):
                vote += as_float(work[_U64((number + 1 + t) * BLOCK) + at]) * votes[t]
            vote = fallback if vote == _ZERO else vote
            sign = _U32(as_bits(vote) & _SIGN)
            total, share = _ZERO, _ZERO
            for t in range(number):
                bits = work[_U64((number + 1 + t) * BLOCK) + at]
                agrees = as_float(_U32(bits ^ sign)) > _ZERO
                total += as_float(bits) * weights[t] if agrees else _ZERO
                share += shares[t] if agrees else _ZERO
            # What nobody voted for is nothing, as is what nobody has a share in.
            voted = as_float(_U32(as_bits(vote) & _MAGNITUDE)) > _ZERO
            share, total = (share, total) if voted else (_ZERO, _ZERO)
            divisor = share if share > _ZERO else _F32(1)
            average = total / divisor if share > _ZERO else _ZERO
            scaled = (average if mean else total) * lambda_
            value = own + scaled
            for t in range(number, 0, -1):
                theirs = as_float(work[_U64(t * BLOCK) + at])
                value = theirs if scaled == theirs - own else value
            bits = as_bits(own if scaled == _ZERO else value)
            largest = _U32(max(largest, _U32(bits & _MAGNITUDE)))
            odd = _U32(_U32(bits >> _U32(16)) & _ONE)
            short = _U32(_U32(bits + _U32(_U32(0x7FFF) + odd)) >> _U32(16))
            work[_U64((2 * number + 1) * BLOCK) + at] = as_bits(scaled)
            work[_U64((2 * number + 2) * BLOCK) + at] = _U32(short << _U32(16))
            out[i] = uint16(short)
        return largest

    @compiled
    def elect_all(work, rates, fallback, mean, lambda_, out):
        votes, weights, shares = (
            to_fixed_tuple(rates[0], number),
            to_fixed_tuple(rates[1], number),
            to_fixed_tuple(rates[2], number),
        )
        return elect(work, votes, weights, shares, fallback, mean, lambda_, out)

    return elect_all


_elect_one, _elect_two, _elect_three, _elect_four = (_election(number) for number in range(1, MOST + 1))


@inlined
def _transform(step, raw, own, floor, least, span, key, cut, factor, start, theirs, delta, masks, words, found):
    """One expert's block; the largest exponent, and how many numbers of its delta a transform leaves."""
    if step == NOTHING:
        return _take(raw, own, theirs, delta), _U32(0)
    if step == TRIM:
        low = _U32(max(floor, _ONE))  # whether a zero is kept makes no difference
        end = _U32(floor + span)
        near = words[: trim(raw, own, low, _U32(max(end, low) - low), theirs, delta, words, found)]
        worst, kept = found[0], found[1]
        if near.size != 0 and floor == low and least != _U64(0):
            kept = _U32(kept - judge(near, least, key, start, masks[: near.size]))
            _mask(delta, near, masks)
        # Of finite numbers differences may be infinite.
        return EXPONENT if worst >= EXPONENT and load_bf16(raw, theirs) else _U32(0), kept
    return _drop(raw, own, draw(key, start, delta.size, cut, words), factor, theirs, delta)


@compiled
def _elect(
    raw16, start, begin, end, origin, steps, mean, rates, fallback, lambda_, out, sums, kept, work, masks, words, found
):  # fmt: skip
    """The elements from ``begin`` to ``end`` of the piece; the rows begin with its element ``origin``."""
    number = kept.size
    codes, floors, leasts, spans, _, keys, cuts, factors = steps
    status = int64(FINE)
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        at = first - origin
        own, block = work[:n], out[first : first + n]
        if load_bf16(raw16[0][at : at + n], own):
            return int64(INPUT_NOT_FINITE)
        worst = _U32(0)
        for t in range(number):
            theirs, delta = work[(t + 1) * BLOCK :][:n], work[(number + 1 + t) * BLOCK :][:n]
            largest, count = _transform(
                codes[0], raw16[t + 1][at : at + n], own, floors[0, t], leasts[0, t], spans[0, t], keys[0, t],
                cuts[0, t], factors[0, t], _U64(start + first), theirs, delta, masks, words, found,
            )  # fmt: skip
            worst = max(worst, largest)
            kept[t] += int64(count)
        if worst == EXPONENT:
            return int64(INPUT_NOT_FINITE)
        if number == 1:
            largest = _elect_one(work, rates, fallback, mean, lambda_, block)
        elif number == 2:
            largest = _elect_two(work, rates, fallback, mean, lambda_, block)
        elif number == 3:
            largest = _elect_three(work, rates, fallback, mean, lambda_, block)
        else:
            largest = _elect_four(work, rates, fallback, mean, lambda_, block)
        if largest > _LARGEST16:
            status = int64(OVERFLOW)
        merged = work[(2 * number + 1) * BLOCK :][:n].view(np.float32)
        sum_up(own.view(np.float32), merged, work[(2 * number + 2) * BLOCK :][:n].view(np.float32), sums)
    return status


def elect(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, mean, rates, fallback, lambda_, out16, sums, kept, scratch,
):  # fmt: skip
    """As `compiled.blend` where rows and result are bf16, rounded to the nearest, experts ``MOST`` at most, and one
    transform, a trim without outliers, a drop or NOTHING, is followed by an election: of the weighted mean if ``mean``,
    else of the weighted sum. ``scratch`` holds ``BLOCK * (2 N + 5) + 2`` words.
    """
    raw16, _, own_kinds, own_files, own_places = rows_at(rows16, rows32, stride, number, kinds, files, places)
    all_steps = steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors)
    work = carray(scratch, (BLOCK * (2 * number + 5) + 2,))
    masks, words = work[BLOCK * (2 * number + 3) :][:BLOCK], work[BLOCK * (2 * number + 4) :][:BLOCK]
    found = work[BLOCK * (2 * number + 5) :]
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    worst = int64(FINE)
    for begin in range(0, count, window):
        end = min(begin + window, count)
        origin = begin if fetched else 0
        if fetched and not fetch_all(raw16, own_kinds, own_files, own_places, begin, end - begin):
            return int64(UNREADABLE)
        status = _elect(
            raw16, start, begin, end, origin, all_steps, mean != 0, carray(rates, (3, number)), fallback, lambda_,
            carray(out16, (count,)), carray(sums, (4,)), carray(kept, (number,)), work, masks, words, found,
        )  # fmt: skip
        if status == INPUT_NOT_FINITE:
            return status
        worst = max(worst, status)
    return worst
