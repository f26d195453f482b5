"""The last step of a search: the threshold among elements that were noted.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.codes import FINE
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.gathering import collect
from ktmerge.merge.kernels.randomness import hash_of

_U32, _U64 = np.uint32, np.uint64
_DIGIT = 11
_MASK = np.uint64((1 << _DIGIT) - 1)


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
def _descend(counts, rank):
    """The digit of the ``rank``-th largest, from 1 on, and its rank among those of that digit."""
    digit = counts.size - 1
    while counts[digit] < rank:
        rank -= counts[digit]
        digit -= 1
    return digit, rank


@compiled
def _largest(keys, rank, bits, counts):
    """The key of the ``rank``-th largest, from 1 on; keys are below ``2**bits``, and their order is lost."""
    shift = max(int64(bits) - _DIGIT, 0)
    while True:
        _count_digits(keys, _U64(shift), counts)
        digit, rank = _descend(counts, rank)
        keys = keys[: _keep_digit(keys, _U64(shift), digit)]
        if shift == 0 or keys.size == 1:
            return keys[0]
        shift = max(shift - _DIGIT, 0)


@compiled
def _count_first(patterns, low, shift, counts):
    """How often each first digit occurs of patterns counted from ``low``."""
    counts[:] = 0
    for i in range(patterns.size):
        counts[int64(_U32(patterns[i] - low) >> shift)] += 1


@compiled
def _widen(patterns, low, last, keys):
    """Those from ``low`` to ``low + last``, counted from there, as keys; how many they are."""
    found = keys.view(np.uint32)  # half as wide, so that from the last on each is read before a key takes its place
    count = collect(patterns, low, last, found)
    for j in range(count - 1, -1, -1):
        keys[j] = _U64(_U32(patterns[found[j]] - low))
    return count


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
    counts = carray(scratch, (1 << _DIGIT,))
    shift = max(int64(bits) - _DIGIT, 0)
    _count_first(own, low, _U32(shift), counts)
    digit, place = _descend(counts, rank)
    first = _U32(int64(low) + (digit << shift))
    count = _widen(own, first, _U32((int64(1) << shift) - 1), wide)
    found[0] = int64(first) + int64(_largest(wide[:count], place, shift, counts))
    found[1], found[2] = _compare(own, _U32(found[0]))
    return int64(FINE)


@compiled
def _hash_equal(places, patterns, floor, key, start, out):
    found = out.view(np.uint32)  # see `_widen`
    count = collect(patterns, floor, _U32(0), found)
    for j in range(count - 1, -1, -1):
        out[j] = hash_of(key, _U64(start) + _U64(places[found[j]]))
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
