"""Random words and hashes of elements, as the torch reference has them.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64, uint16

from ktmerge.merge.kernels.codes import BLOCK, FINE
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.keys import LOWER

_U32, _U64 = np.uint32, np.uint64
_LOW = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_LOWER = np.uint64(LOWER)
_HALF = BLOCK // 2
_ALL16 = np.uint16(0xFFFF)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@compiled
def _philox(key, first, out):
    """Words of the counters from ``first`` on, two in each 64 bits; see `ktmerge.merge.kernels.philox`.

    Two counters at a time: one alone waits for its own products. What is above 32 bits is garbage until it is cut off.
    """
    for b in range(out.size // 4):
        a0, a1, a2, a3 = first + _U64(2 * b), (first + _U64(2 * b)) >> _U64(32), _U64(0), _U64(0)
        b0, b1, b2, b3 = first + _U64(2 * b + 1), (first + _U64(2 * b + 1)) >> _U64(32), _U64(0), _U64(0)
        k0, k1 = key, key >> _U64(32)
        for _ in range(10):
            p0, p1 = _M0 * (a0 & _LOW), _M1 * (a2 & _LOW)
            q0, q1 = _M0 * (b0 & _LOW), _M1 * (b2 & _LOW)
            a0, a1, a2, a3 = (p1 >> _U64(32)) ^ a1 ^ k0, p1, (p0 >> _U64(32)) ^ a3 ^ k1, p0
            b0, b1, b2, b3 = (q1 >> _U64(32)) ^ b1 ^ k0, q1, (q0 >> _U64(32)) ^ b3 ^ k1, q0
            k0, k1 = k0 + _W0, k1 + _W1
        out[4 * b], out[4 * b + 1] = (a0 & _LOW) | (a1 << _U64(32)), (a2 & _LOW) | (a3 << _U64(32))
        out[4 * b + 2], out[4 * b + 3] = (b0 & _LOW) | (b1 << _U64(32)), (b2 & _LOW) | (b3 << _U64(32))


@compiled
def random_words(key, start, count, out):
    """Random words of ``count`` elements from ``start``, a multiple of 4; up to seven more are written."""
    _philox(key, _U64(start) >> _U64(2), out[: (count + 7) // 8 * 8].view(np.uint64))


@compiled
def draw(key, start, count, cut, words):
    """All bits where an element's draw is below ``cut``, no more than 2^32, none elsewhere; see `Kernels.draws`.

    ``start`` is a multiple of 8; ``words`` is scratch, BLOCK words. Lower halves are drawn only where one decides.
    """
    pairs, upper = (count + 1) // 2, uint16(min(cut >> _U64(16), _U64(_ALL16)))
    lower = _U32(cut - (_U64(upper) << _U64(16)))
    random_words(key, start >> _U64(1), pairs, words[:_HALF])
    halves, masks = words[:_HALF].view(np.uint16)[:count], words[_HALF:].view(np.uint16)[:count]
    undecided = False
    for i in range(count):
        masks[i] = _ALL16 if halves[i] < upper else uint16(0)
        undecided |= halves[i] == upper
    if undecided and lower != _U32(0):
        random_words(key ^ _LOWER, start >> _U64(1), pairs, words[_HALF:])
        for i in range(count):
            below = (halves[i] < upper) | ((halves[i] == upper) & (_U32(masks[i]) < lower))
            masks[i] = _ALL16 if below else uint16(0)
    return masks


@compiled
def hash_of(key, element):
    """See `ktmerge.merge.kernels.splitmix`."""
    z = key + (element + _U64(1)) * _U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


@compiled
def judge(tied, least, key, start, masks):
    """All bits where the hash of an element is ``least`` or more, none elsewhere; how many those are."""
    dropped = _U32(0)
    for j in range(tied.size):
        stays = hash_of(key, start + _U64(tied[j])) >= least
        masks[j] = _U32(0xFFFFFFFF) if stays else _U32(0)
        dropped = _U32(dropped + (_U32(0) if stays else _U32(1)))
    return dropped


@compiled
def _widen(words, out):
    for i in range(out.size):
        out[i] = int64(words[i])


def words(key, start, count, out, scratch):
    """The random words of ``count`` elements from ``start`` into int64 ``out``; FINE. ``scratch``: BLOCK words."""
    target, work = carray(out, (count,)), carray(scratch, (BLOCK,))
    done = int64(0)
    while done < count:
        element = start + done
        skipped = element % 4
        size = min(BLOCK - skipped, count - done)
        random_words(key, element - skipped, skipped + size, work)
        _widen(work[skipped : skipped + size], target[done : done + size])
        done += size
    return int64(FINE)
