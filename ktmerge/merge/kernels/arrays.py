"""What stages want to know of fp32 arrays: exact sums, counts of magnitudes, inner products; and deltas as such arrays.

Compiled by numba; see `ktmerge.merge.kernels.compiled`. ``memory16`` and ``memory32`` are the address 0, so that
``places`` are addresses divided by the width of an element. All sums are of whole numbers: no order shows in them.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.codes import BLOCK, FINE, INPUT_NOT_FINITE
from ktmerge.merge.kernels.compiler import compiled, compiled_sums
from ktmerge.merge.kernels.conversion import load
from ktmerge.merge.kernels.randomness import hash_of
from ktmerge.merge.kernels.transforming import count_kept, steps_at, subtract, transform

_U32, _U64, _F64 = np.uint32, np.uint64, np.float64
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ONE = np.uint32(1)
_ALL = 1 << 60
"""Elements of an array that is all memory: addresses are its indices."""
_ROUND = np.float64(3 << 51)
"""Added and taken off again, rounds to a whole number, ties to even."""
_HALF = 17
"""Bits of half an integer; see `ktmerge.merge.geometry`."""


def spread(
    memory16, memory32, kinds, places, number, count, start, step_count, steps, floors, leasts, spans, tops, keys, cuts,
    factors, out, kept, scratch,
):  # fmt: skip
    """Base and experts' deltas after the transforms, fp32 ``[N + 1, count]``, into ``out``; FINE or INPUT_NOT_FINITE.

    Added to: ``kept`` int64 ``[N]``, non-zeros after the transforms. ``scratch`` holds ``2 * BLOCK`` words. Else as
    `blend`.
    """
    all16, all32 = carray(memory16, (_ALL,)), carray(memory32, (_ALL,))
    own_kinds, own_places = carray(kinds, (number + 1,)), carray(places, (number + 1,))
    all_steps = steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors)
    own_kept = carray(kept, (number,))
    values = carray(out, (number + 1, count))
    work = carray(scratch, (2, BLOCK))
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        base = values[0][first : first + n]
        if load(own_kinds[0], all16[own_places[0] + first :], all32[own_places[0] + first :], 0, base.view(np.uint32)):
            return int64(INPUT_NOT_FINITE)
        for t in range(number):
            other, delta = work[0][:n], values[t + 1][first : first + n]
            place = own_places[t + 1] + first
            if load(own_kinds[t + 1], all16[place:], all32[place:], 0, other):
                return int64(INPUT_NOT_FINITE)
            subtract(other.view(np.float32), base, delta)
            transform(all_steps, delta, start + first, t, work[1])
            own_kept[t] += count_kept(delta.view(np.uint32))
    return int64(FINE)


@compiled
def _add_magnitudes(patterns, sums):
    for i in range(patterns.size):
        exponent = _U32(_U32(patterns[i] >> _U32(23)) & _U32(0xFF))
        mantissa = _U64(patterns[i] & _U32(0x7FFFFF)) + (_U64(1 << 23) if exponent else _U64(0))
        sums[max(exponent, _ONE)] += mantissa


@compiled
def add_squares(patterns, high, low):
    """Squares of 24-bit mantissas by exponent, in two halves of 24 bits, so that sums are exact."""
    for i in range(patterns.size):
        exponent = _U32(_U32(patterns[i] >> _U32(23)) & _U32(0xFF))
        mantissa = _U64(patterns[i] & _U32(0x7FFFFF)) + (_U64(1 << 23) if exponent else _U64(0))
        square = mantissa * mantissa
        place = max(exponent, _ONE)
        high[place] += square >> _U64(24)
        low[place] += square & _U64(0xFFFFFF)


def add_up(patterns, count, power, bins):
    """Add magnitudes (``power`` 1) or squares (2) of up to 2**40 fp32 numbers to ``bins`` uint64 ``[2, 256]``; FINE.

    By exponent; of magnitudes the 24-bit mantissas into the second row, of squares as `add_squares` has it.
    """
    values, sums = carray(patterns, (count,)), carray(bins, (2, 256))
    if power == 1:
        _add_magnitudes(values, sums[1])
    else:
        add_squares(values, sums[0], sums[1])
    return int64(FINE)


@compiled
def _tally(patterns, low, last, shift, counts):
    above = 0
    for i in range(patterns.size):
        pattern = _U32(patterns[i] & _MAGNITUDE)
        inside = _U32(pattern - low)
        if pattern >= low and inside <= last:
            counts[inside >> shift] += 1
        above += 1 if pattern > _U32(low + last) else 0
    counts[counts.size - 1] += above


def tally(patterns, count, low, last, shift, bins, counts):
    """Count fp32 numbers by their magnitude patterns from ``low`` to ``low + last`` in bins of ``2**shift``; FINE.

    Added to: ``counts`` int64 ``[bins + 1]``, the last of how many are above.
    """
    _tally(carray(patterns, (count,)), low, last, shift, carray(counts, (bins + 1,)))
    return int64(FINE)


@compiled
def _tally_hashes(patterns, start, floor, key, low, last, shift, counts):
    for i in range(patterns.size):
        if _U32(patterns[i] & _MAGNITUDE) != floor:
            continue
        value = hash_of(key, _U64(start) + _U64(i))
        if value >= low:
            inside = value - low
            counts[int64(inside >> shift) if inside <= last else counts.size - 1] += 1


def tally_hashes(patterns, count, start, floor, key, low, last, shift, bins, counts):
    """As `tally`, of the hashes of those whose magnitude pattern is ``floor``; ``start`` is the first one's index."""
    _tally_hashes(carray(patterns, (count,)), start, floor, key, low, last, _U64(shift), carray(counts, (bins + 1,)))
    return int64(FINE)


@compiled
def _select(patterns, start, floor, least, key, out):
    for i in range(out.size):
        pattern = _U32(patterns[i] & _MAGNITUDE)
        out[i] = patterns[i] if pattern >= floor else _U32(0)
    if least != _U64(0):
        for i in range(out.size):
            if _U32(patterns[i] & _MAGNITUDE) == floor and hash_of(key, _U64(start) + _U64(i)) < least:
                out[i] = _U32(0)


def select(patterns, count, start, floor, least, key, out):
    """What has a magnitude pattern above ``floor``, or just that and a hash of at least ``least``; else 0. FINE."""
    _select(carray(patterns, (count,)), start, floor, least, key, carray(out, (count,)))
    return int64(FINE)


@compiled
def _split(values, unit, high, low):
    """Whole numbers of ``1 / unit``, in two halves."""
    for i in range(values.size):
        whole = (_F64(values[i]) * unit + _ROUND) - _ROUND
        upper = (whole * _F64(1 / (1 << _HALF)) + _ROUND) - _ROUND
        high[i] = upper
        low[i] = whole - upper * _F64(1 << _HALF)


@compiled_sums
def _product(first, second):
    total = _F64(0)
    for i in range(first.size):
        total += first[i] * second[i]
    return int64(total)


@compiled
def _add_pair(a, b, n, vectors, highs, lows, sums):
    """The four products of the halves of two vectors, where a matrix product of all halves would have them."""
    outer = _product(highs[a][:n], highs[b][:n])
    inner = _product(lows[a][:n], lows[b][:n])
    mixed, other = _product(highs[a][:n], lows[b][:n]), _product(lows[a][:n], highs[b][:n])
    sums[a][b] += outer
    sums[vectors + a][vectors + b] += inner
    sums[a][vectors + b] += mixed
    sums[vectors + a][b] += other
    if a != b:
        sums[b][a] += outer
        sums[vectors + b][vectors + a] += inner
        sums[vectors + b][a] += mixed
        sums[b][vectors + a] += other


def products(memory32, places, vectors, rows, wide, units, sums, scratch):
    """Inner products of halves of integers, group by group; FINE.

    Args:
        memory32: see above.
        places: int64 ``[V]``: the first elements of deltas, and of the base last.
        vectors: V.
        rows: how many groups.
        wide: elements of each, one group after the other.
        units: fp64 ``[rows, V]``: what makes integers of up to 34 bits of each group's values.
        sums: int64 ``[rows, 2 V, 2 V]``, added to; not of base and delta.
        scratch: fp64 ``[2, V, BLOCK]``.
    """
    values, own_places = carray(memory32, (_ALL,)), carray(places, (vectors,))
    own_units, totals = carray(units, (rows, vectors)), carray(sums, (rows, 2 * vectors, 2 * vectors))
    work = carray(scratch, (2, vectors, BLOCK))
    for row in range(rows):
        for first in range(0, wide, BLOCK):
            n = min(BLOCK, wide - first)
            for v in range(vectors):
                begin = own_places[v] + row * wide + first
                own = values[begin : begin + n].view(np.float32)
                _split(own, own_units[row][v], work[0][v][:n], work[1][v][:n])
            for a in range(vectors - 1):
                for b in range(a, vectors - 1):
                    _add_pair(a, b, n, vectors, work[0], work[1], totals[row])
            _add_pair(vectors - 1, vectors - 1, n, vectors, work[0], work[1], totals[row])
    return int64(FINE)
