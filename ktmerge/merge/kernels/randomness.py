"""Random words and hashes of elements, as the torch reference has them.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.codes import BLOCK, FINE
from ktmerge.merge.kernels.compiler import compiled

_U32, _U64 = np.uint32, np.uint64
_LOW = np.uint64(0xFFFFFFFF)


@compiled
def _philox(key, first_counter, w0, w1, w2, w3):
    """Lane ``l`` of counter ``first_counter + b`` into ``w_l[b]``; see `ktmerge.merge.kernels.philox`."""
    for b in range(w0.size):
        counter = first_counter + _U64(b)
        c0, c1, c2, c3 = counter & _LOW, counter >> _U64(32), _U64(0), _U64(0)
        k0, k1 = key & _LOW, key >> _U64(32)
        for _ in range(10):
            p0, p1 = _U64(0xD2511F53) * c0, _U64(0xCD9E8D57) * c2
            c0, c1 = (p1 >> _U64(32)) ^ c1 ^ k0, p1 & _LOW
            c2, c3 = (p0 >> _U64(32)) ^ c3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _U64(0x9E3779B9)) & _LOW, (k1 + _U64(0xBB67AE85)) & _LOW
        w0[b], w1[b], w2[b], w3[b] = _U32(c0), _U32(c1), _U32(c2), _U32(c3)


@compiled
def _interleave(w0, w1, w2, w3, out):
    for b in range(w0.size):
        out[4 * b], out[4 * b + 1], out[4 * b + 2], out[4 * b + 3] = w0[b], w1[b], w2[b], w3[b]


@compiled
def random_words(key, start, lanes, out):
    """Random words of the elements ``start .. start + out.size``; ``start`` and the size are multiples of 4."""
    q = out.size // 4
    w0, w1, w2, w3 = lanes[:q], lanes[q : 2 * q], lanes[2 * q : 3 * q], lanes[3 * q : 4 * q]
    _philox(key, _U64(start) >> _U64(2), w0, w1, w2, w3)
    _interleave(w0, w1, w2, w3, out)


@compiled
def hash_of(key, element):
    """See `ktmerge.merge.kernels.splitmix`."""
    z = key + (element + _U64(1)) * _U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


@compiled
def _widen(words, out):
    for i in range(out.size):
        out[i] = int64(words[i])


def words(key, start, count, out, scratch):
    """The random words of ``count`` elements from ``start`` into int64 ``out``; FINE. ``scratch``: 2 BLOCK words."""
    target = carray(out, (count,))
    work = carray(scratch, (2, BLOCK))
    done = int64(0)
    while done < count:
        element = start + done
        skipped = element % 4
        size = min(BLOCK - skipped, count - done)
        random_words(key, element - skipped, work[0], work[1])
        _widen(work[1][skipped : skipped + size], target[done : done + size])
        done += size
    return int64(FINE)
