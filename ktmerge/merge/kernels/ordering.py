"""Ranks of magnitudes within rows, compiled by numba; see `ktmerge.merge.kernels.compiled`."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.codes import DIGIT, DIGITS, FINE
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.randomness import hash_of

_U32, _U64 = np.uint32, np.uint64
_FEW = 256
"""Elements of a row that are compared with each other."""
_MAGNITUDE, _LAST = np.uint32(0x7FFFFFFF), np.uint64((1 << DIGIT) - 1)


@compiled
def _keys(patterns, elements, key, keys, counts):
    """Magnitude, and below it the upper half of the hash, as one number; how often each digit of those occurs."""
    counts[:, :] = _U32(0)
    for i in range(keys.size):
        hashed = hash_of(key, _U64(elements[i])) >> _U64(32)
        number = (_U64(_U32(patterns[i] & _MAGNITUDE)) << _U64(32)) | hashed
        keys[i] = number
        for digit in range(DIGITS):
            counts[digit][int64((number >> _U64(DIGIT * digit)) & _LAST)] += _U32(1)


@compiled
def _sort_by(digit, keys, counts, order, sorted):
    """One pass of a radix sort that keeps the order of equals; False if the digit is the same everywhere."""
    shift = _U64(DIGIT * digit)
    if counts[int64((keys[0] >> shift) & _LAST)] == _U32(keys.size):
        return False
    before = _U32(0)
    for value in range(counts.size):
        count = counts[value]
        counts[value] = before
        before = _U32(before + count)
    for i in range(order.size):
        value = int64((keys[order[i]] >> shift) & _LAST)
        sorted[counts[value]] = order[i]
        counts[value] = _U32(counts[value] + _U32(1))
    return True


@compiled
def _count_smaller(keys, own):
    count = int64(0)
    for j in range(keys.size):
        count += int64(1) if keys[j] < own else int64(0)
    return count


@compiled
def _rank_few(patterns, elements, key, out, keys):
    """Compare each with each: what a radix sort sets up takes longer for so few."""
    total = int64(0)
    for i in range(keys.size):
        hashed = hash_of(key, _U64(elements[i])) >> _U64(32)
        keys[i] = int64((_U64(_U32(patterns[i] & _MAGNITUDE)) << _U64(32)) | hashed)
    for i in range(keys.size):
        out[i] = _count_smaller(keys, keys[i])
        total += out[i]
    if total != keys.size * (keys.size - 1) // 2:  # equal keys: in the order of the row
        for i in range(keys.size):
            for j in range(i):
                out[i] += int64(1) if keys[j] == keys[i] else int64(0)


@compiled
def _rank(patterns, elements, key, out, keys, counts, order, other):
    _keys(patterns, elements, key, keys, counts)
    for i in range(order.size):
        order[i] = _U32(i)
    turned = False
    for digit in range(DIGITS):
        source, target = (other, order) if turned else (order, other)
        if _sort_by(digit, keys, counts[digit], source, target):
            turned = not turned
    final = other if turned else order
    for i in range(out.size):
        out[final[i]] = int64(i)


def rank(values, elements, key, rows, wide, out, keys, orders, counts):
    """Rank of each magnitude in its row, 0 the smallest, int64 ``[rows, wide]`` into ``out``; FINE.

    ``values`` are fp32 patterns and ``elements`` the indices whose hash by ``key`` (its upper half) decides between
    equals, both ``[rows, wide]``; then the order in the row. Scratch: ``keys`` uint64 ``[wide]``, ``orders`` uint32
    ``[2, wide]``, ``counts`` uint32 ``[DIGITS, 2**DIGIT]``.
    """
    shape = (rows, wide)
    patterns, indices, ranks = carray(values, shape), carray(elements, shape), carray(out, shape)
    own_orders = carray(orders, (2, wide))
    for row in range(rows):
        if wide <= _FEW:
            _rank_few(patterns[row], indices[row], key, ranks[row], carray(keys, (wide,)).view(np.int64))
            continue
        _rank(
            patterns[row], indices[row], key, ranks[row], carray(keys, (wide,)),
            carray(counts, (DIGITS, 1 << DIGIT)), own_orders[0], own_orders[1],
        )  # fmt: skip
    return int64(FINE)
