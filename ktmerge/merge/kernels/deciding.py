"""The first and the last step of a search: a sample in order, and the threshold among elements that were noted.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.codes import FINE
from ktmerge.merge.kernels.combining import copy
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.randomness import hash_of

_U32, _U64 = np.uint32, np.uint64
_DIGIT, _DIGITS = 11, 3
_ONE = np.uint32(1)
_MASK = np.uint64((1 << _DIGIT) - 1)


@compiled
def _count_all_digits(patterns, counts):
    counts[:, :] = _U32(0)
    for i in range(patterns.size):
        wide = _U64(patterns[i])
        for digit in range(_DIGITS):
            counts[digit][int64((wide >> _U64(digit * _DIGIT)) & _MASK)] += _ONE


@compiled
def _place(patterns, shift, counts, out):
    """Put patterns where their digit belongs, equals in the order they have."""
    before = _U32(0)
    for digit in range(counts.size):
        count = counts[digit]
        counts[digit] = before
        before = _U32(before + count)
    for i in range(patterns.size):
        digit = int64((_U64(patterns[i]) >> shift) & _MASK)
        out[counts[digit]] = patterns[i]
        counts[digit] = _U32(counts[digit] + _ONE)


def sort(patterns, rows, size, other, scratch):
    """Bring each row of patterns, uint32 ``[rows, size]``, into ascending order; FINE.

    Scratch: ``other`` is as long as a row, ``scratch`` holds ``3 * 2**11`` words.
    """
    counts = carray(scratch, (_DIGITS, 1 << _DIGIT))
    given, spare = carray(patterns, (rows, size)), carray(other, (size,))
    for row in range(rows):
        source, target = given[row], spare
        _count_all_digits(source, counts)
        for digit in range(_DIGITS):
            _place(source, _U64(digit * _DIGIT), counts[digit], target)
            source, target = target, source
        copy(spare, given[row])  # where an odd number of passes ends
    return int64(FINE)


@compiled
def _count_digits(keys, shift, counts):
    counts[:] = 0
    for i in range(keys.size):
        counts[int64((keys[i] >> shift) & _MASK)] += 1


@compiled
def _keep_digit(keys, shift, digit):
    """Bring the keys with this digit to the front; how many they are."""
    kept = 0
    for i in range(keys.size):
        key = keys[i]
        keys[kept] = key
        kept += 1 if int64((key >> shift) & _MASK) == digit else 0
    return kept


@compiled
def _largest(keys, rank, bits, counts):
    """The key of the ``rank``-th largest, from 1 on; keys are below ``2**bits``, and their order is lost."""
    shift = max(int64(bits) - _DIGIT, 0)
    while True:
        _count_digits(keys, _U64(shift), counts)
        digit = counts.size - 1
        while counts[digit] < rank:
            rank -= counts[digit]
            digit -= 1
        keys = keys[: _keep_digit(keys, _U64(shift), digit)]
        if shift == 0 or keys.size == 1:
            return keys[0]
        shift = max(shift - _DIGIT, 0)


@compiled
def _widen(patterns, low, keys):
    for i in range(patterns.size):
        keys[i] = _U64(_U32(patterns[i] - low))


@compiled
def _compare(patterns, floor):
    above, equal = int64(0), int64(0)
    for i in range(patterns.size):
        above += 1 if patterns[i] > floor else 0
        equal += 1 if patterns[i] == floor else 0
    return above, equal


def rank_noted(patterns, noted, rank, low, bits, keys, scratch, decision):
    """The ``rank``-th largest of so many magnitude patterns, from ``low`` on and below ``low + 2**bits``; FINE.

    ``decision``, int64 ``[3]``, takes it, how many are larger, and how many equal. ``keys`` is scratch for as many
    uint64, ``scratch`` int64 ``[2**11]``.
    """
    own, wide, found = carray(patterns, (noted,)), carray(keys, (noted,)), carray(decision, (3,))
    _widen(own, low, wide)
    found[0] = int64(_largest(wide, rank, bits, carray(scratch, (1 << _DIGIT,)))) + int64(low)
    found[1], found[2] = _compare(own, _U32(found[0]))
    return int64(FINE)


@compiled
def _hash_equal(places, patterns, floor, key, start, out):
    count = 0
    for j in range(places.size):
        if patterns[j] == floor:
            out[count] = hash_of(key, _U64(start) + _U64(places[j]))
            count += 1
    return count


def hash_noted(places, patterns, noted, floor, key, start, out):
    """The hashes, by ``key``, of those of the noted elements that have the magnitude ``floor`` into uint64 ``out``.

    ``start`` is the index of the first element of the piece in its tensor. How many they are.
    """
    size = (noted,)
    return int64(_hash_equal(carray(places, size), carray(patterns, size), floor, key, start, carray(out, size)))


def rank_hashes(hashes, count, rank, scratch, least):
    """The ``rank``-th largest of so many hashes, whose order is lost, into ``least``; FINE. ``scratch`` as above."""
    carray(least, (1,))[0] = _largest(carray(hashes, (count,)), rank, 64, carray(scratch, (1 << _DIGIT,)))
    return int64(FINE)
