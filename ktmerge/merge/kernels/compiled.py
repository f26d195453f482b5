"""Element-wise blends compiled by numba: one pass over blocks that stay in the processor's first cache.

Equals the torch reference bit for bit: the same operations on fp32 numbers in the same order, each rounded by itself
(no fused multiply-add, no reassociation). Every loop is a function of its own over contiguous arrays, the form that
compiles to vector instructions. Importing this loads numba and no torch; nothing here takes the interpreter's lock.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 4096
"""Elements worked on at a time: a dozen arrays of them fit into 256 KB."""

NONE, TRIM, DROP = 0, 1, 2
SUM, ELECT = 0, 1
FINE, INPUT_NOT_FINITE, OVERFLOW = 0, 1, 2

_U32, _U64, _F32 = np.uint32, np.uint64, np.float32
_MAGNITUDE, _EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_LARGEST16 = np.uint32(0x7F7F0000)
_LOW = np.uint64(0xFFFFFFFF)

_compile = njit(nogil=True, cache=True, error_model="numpy")
# Sums that only the report shows may be taken in any order.
_compile_sums = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})


@_compile
def _widen(raw, out):
    for i in range(out.size):
        out[i] = _U32(raw[i]) << _U32(16)


@_compile
def _copy(raw, out):
    for i in range(out.size):
        out[i] = raw[i]


@_compile
def _load(raw, start, out):
    """Elements from ``start`` on as fp32 patterns. ``raw`` is a pair, bf16 as uint16 and fp32 as uint32, one empty."""
    if raw[1].size:
        _copy(raw[1][start : start + out.size], out)
    else:
        _widen(raw[0][start : start + out.size], out)


@_compile
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


@_compile
def _word_at(key, element, plane):
    c0, c1, c2, c3 = (element >> _U64(2)) & _LOW, element >> _U64(34), plane, _U64(0)
    k0, k1 = key & _LOW, key >> _U64(32)
    for _ in range(10):
        p0, p1 = _U64(0xD2511F53) * c0, _U64(0xCD9E8D57) * c2
        c0, c1 = (p1 >> _U64(32)) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = (p0 >> _U64(32)) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _U64(0x9E3779B9)) & _LOW, (k1 + _U64(0xBB67AE85)) & _LOW
    lane = element & _U64(3)
    if lane < _U64(2):
        return c0 if lane == _U64(0) else c1
    return c2 if lane == _U64(2) else c3


@_compile
def _interleave(w0, w1, w2, w3, out):
    for b in range(w0.size):
        out[4 * b], out[4 * b + 1], out[4 * b + 2], out[4 * b + 3] = w0[b], w1[b], w2[b], w3[b]


@_compile
def _words(key, start, lanes, out):
    """Random words of the elements ``start .. start + out.size``; ``start`` and the size are multiples of 4."""
    q = out.size // 4
    w0, w1, w2, w3 = lanes[0][:q], lanes[1][:q], lanes[2][:q], lanes[3][:q]
    _philox(key, _U64(start) >> _U64(2), w0, w1, w2, w3)
    _interleave(w0, w1, w2, w3, out)


@_compile
def _not_finite(patterns):
    worst = _U32(0)
    for i in range(patterns.size):
        worst = max(worst, patterns[i] & _EXPONENT)
    return worst == _EXPONENT


@_compile
def _subtract(expert, base, out):
    for i in range(out.size):
        out[i] = expert[i] - base[i]


@_compile
def _keep_above(delta, floor):
    """Zero what has a smaller magnitude pattern than ``floor``; whether any has exactly that pattern."""
    patterns = delta.view(np.uint32)
    tied = _U32(0)
    for i in range(delta.size):
        magnitude = patterns[i] & _MAGNITUDE
        tied |= _U32(1) if magnitude == floor else _U32(0)
        patterns[i] = patterns[i] if magnitude >= floor else _U32(0)
    return tied != _U32(0)


@_compile
def _keep_hashed(delta, floor, words, high, low, key, start):
    """Among the elements at ``floor``, zero those whose 64-bit hash is below ``(high, low)``."""
    patterns = delta.view(np.uint32)
    for i in range(delta.size):
        below = ((patterns[i] & _MAGNITUDE) == floor) & (words[i] < high)
        patterns[i] = _U32(0) if below else patterns[i]
    if low == _U32(0):
        return
    for i in range(delta.size):  # equal in the first 32 bits: one in four thousand millions
        at_edge = ((patterns[i] & _MAGNITUDE) == floor) & (words[i] == high)
        if at_edge and _word_at(key, _U64(start + i), _U64(1)) < _U64(low):
            patterns[i] = _U32(0)


@_compile
def _drop(delta, words, cut, factor):
    for i in range(delta.size):
        delta[i] = delta[i] * factor if _U64(words[i]) < cut else _F32(0)


@_compile
def _scale_into(delta, weight, total):
    for i in range(total.size):
        total[i] = delta[i] * weight


@_compile
def _add_into(delta, weight, total):
    for i in range(total.size):
        total[i] += delta[i] * weight


@_compile
def _agree_first(delta, vote, weight, total, share):
    for i in range(total.size):
        agrees = ((delta[i] > 0) & (vote[i] > 0)) | ((delta[i] < 0) & (vote[i] < 0))
        total[i] = (delta[i] if agrees else _F32(0)) * weight
        share[i] = (_F32(1) if agrees else _F32(0)) * weight


@_compile
def _agree_next(delta, vote, weight, total, share):
    for i in range(total.size):
        agrees = ((delta[i] > 0) & (vote[i] > 0)) | ((delta[i] < 0) & (vote[i] < 0))
        total[i] += (delta[i] if agrees else _F32(0)) * weight
        share[i] += (_F32(1) if agrees else _F32(0)) * weight


@_compile
def _divide(total, share):
    for i in range(total.size):
        divisor = share[i] if share[i] > 0 else _F32(1)
        total[i] = total[i] / divisor if share[i] > 0 else _F32(0)


@_compile
def _times(merged, factor):
    for i in range(merged.size):
        merged[i] = merged[i] * factor


@_compile
def _add(base, merged, out):
    for i in range(out.size):
        out[i] = base[i] + merged[i]


@_compile
def _settle_expert(merged, delta, expert, out):
    for i in range(out.size):
        out[i] = expert[i] if merged[i] == delta[i] else out[i]


@_compile
def _settle_base(merged, base, out):
    for i in range(out.size):
        out[i] = base[i] if merged[i] == 0 else out[i]


@_compile
def _nearest16(patterns, out):
    for i in range(out.size):
        bits = patterns[i]
        out[i] = np.uint16((bits + _U32(0x7FFF) + ((bits >> _U32(16)) & _U32(1))) >> _U32(16))


@_compile
def _stochastic16(patterns, words, out):
    for i in range(out.size):
        bits = patterns[i]
        carried = bits + (words[i] >> _U32(16))
        carried = bits if (carried & _EXPONENT) == _EXPONENT else carried
        out[i] = np.uint16(carried >> _U32(16))


@_compile
def _count(values):
    count = 0
    for i in range(values.size):
        count += 1 if values[i] != 0 else 0
    return count


@_compile_sums
def _measure(base, merged, stored, sums):
    intended, own, along = np.float64(0), np.float64(0), np.float64(0)
    changed = 0
    for i in range(base.size):
        moved = stored[i] - base[i]
        intended += np.float64(merged[i]) * np.float64(merged[i])
        own += np.float64(base[i]) * np.float64(base[i])
        along += np.float64(moved) * np.float64(merged[i])
        changed += 1 if moved != 0 else 0
    sums[0] += intended
    sums[1] += own
    sums[2] += along
    sums[3] += changed


@_compile
def blend(
    base, experts, start, transform, floors, highs, lows, keys, cuts, factors, combine, votes, weights, lambda_,
    stochastic, round_key, out, sums, kept,
):  # fmt: skip
    """Blend one piece; FINE, INPUT_NOT_FINITE or OVERFLOW.

    Raw arrays come in pairs, uint16 for bf16 and uint32 for fp32, of which the one that does not apply is empty:
    ``base`` and ``out`` ``[n]``, ``experts`` ``[N, n]``. ``start``, the index of the first element in its tensor, is a
    multiple of 4.

    ``transform`` is NONE, TRIM (``floors``, ``highs``, ``lows``: per expert, the least key that is kept) or DROP
    (``cuts``: words below are kept; ``factors``: what they are multiplied by), with ``keys`` of the random streams.
    ``combine`` is SUM of ``weights`` times deltas, or ELECT by ``votes`` times deltas and their mean by ``weights``.

    Added to: ``sums`` fp64 ``[4]``, squared norms of merged delta and base, inner product of the former with what was
    stored, number of changed elements; ``kept`` int64 ``[N]``, non-zeros after the transform.
    """
    count, number = max(base[0].size, base[1].size), len(keys)
    theta = np.empty((number, BLOCK), np.uint32)
    delta = np.empty((number, BLOCK), np.float32)
    own, words = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    lanes = np.empty((4, BLOCK // 4), np.uint32)
    vote, share = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    merged, values = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    status = FINE
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        padded = (n + 3) // 4 * 4
        theta0 = own[:n].view(np.float32)
        _load(base, first, own[:n])
        if _not_finite(own[:n]):
            return INPUT_NOT_FINITE
        m, v, r = merged[:n], vote[:n], values[:n]
        for t in range(number):
            d = delta[t][:n]
            _load((experts[0][t], experts[1][t]), first, theta[t][:n])
            if _not_finite(theta[t][:n]):
                return INPUT_NOT_FINITE
            _subtract(theta[t][:n].view(np.float32), theta0, d)
            if transform == TRIM:
                if _keep_above(d, floors[t]) and (highs[t] | lows[t]) != _U32(0):
                    _words(keys[t], start + first, lanes, words[:padded])
                    _keep_hashed(d, floors[t], words[:n], highs[t], lows[t], keys[t], start + first)
            elif transform == DROP:
                _words(keys[t], start + first, lanes, words[:padded])
                _drop(d, words[:n], cuts[t], factors[t])
            if transform != NONE:
                kept[t] += _count(d)
            if combine == SUM:
                if t == 0:
                    _scale_into(d, weights[0], m)
                else:
                    _add_into(d, weights[t], m)
            elif t == 0:
                _scale_into(d, votes[0], v)
            else:
                _add_into(d, votes[t], v)
        if combine == ELECT:
            _agree_first(delta[0][:n], v, weights[0], m, share[:n])
            for t in range(1, number):
                _agree_next(delta[t][:n], v, weights[t], m, share[:n])
            _divide(m, share[:n])
        if lambda_ != _F32(1):
            _times(m, lambda_)
        _add(theta0, m, r)
        for t in range(number - 1, -1, -1):
            expert = theta[t][:n].view(np.float32)
            d = delta[t][:n]
            if transform != NONE:  # the delta as it came, before the transform
                _subtract(expert, theta0, d)
            _settle_expert(m, d, expert, r)
        _settle_base(m, theta0, r)
        if stochastic:
            _words(round_key, start + first, lanes, words[:padded])
        if _store(r.view(np.uint32), words[:n], stochastic, out, first):
            status = OVERFLOW
        _measure(theta0, m, words[:n].view(np.float32), sums)
    return status


@_compile
def _store(patterns, words, stochastic, raw, start):
    """Round to the type of ``raw``, a pair as in `_load`; whether a value is beyond it. Leaves fp32 in ``words``."""
    if raw[1].size:
        _copy(patterns, raw[1][start : start + patterns.size])
        _copy(patterns, words)
        return _not_finite(patterns)
    stored = raw[0][start : start + patterns.size]
    if stochastic:
        _stochastic16(patterns, words, stored)
    else:
        _nearest16(patterns, stored)
    _widen(stored, words)
    worst = _U32(0)
    for i in range(patterns.size):
        worst = max(worst, patterns[i] & _MAGNITUDE)
    return worst > _LARGEST16


@_compile
def _count_first(delta, counts):
    patterns = delta.view(np.uint32)
    for i in range(delta.size):
        counts[(patterns[i] & _MAGNITUDE) >> _U32(15)] += 1


@_compile
def _count_second(delta, wanted, counts):
    patterns = delta.view(np.uint32)
    for i in range(delta.size):
        magnitude = patterns[i] & _MAGNITUDE
        if (magnitude >> _U32(15)) == wanted:
            counts[magnitude & _U32(0x7FFF)] += 1


@_compile
def _count_hashed(delta, floor, words, digit, high, key, start, counts):
    """Digit 0 or 1 of the first hash word, or 2 or 3 in the second, among the tied whose digits so far are ``high``."""
    patterns = delta.view(np.uint32)
    for i in range(delta.size):
        if (patterns[i] & _MAGNITUDE) != floor:
            continue
        word = words[i]
        if digit == 0:
            counts[word >> _U32(16)] += 1
        elif digit == 1:
            if (word >> _U32(16)) == _U32(high):
                counts[word & _U32(0xFFFF)] += 1
        elif word == _U32(high >> _U64(16) if digit == 3 else high):
            second = _word_at(key, _U64(start + i), _U64(1))
            if digit == 2:
                counts[second >> _U64(16)] += 1
            elif (second >> _U64(16)) == (high & _U64(0xFFFF)):
                counts[second & _U64(0xFFFF)] += 1


@_compile
def histogram(base, expert, start, key, length, first, second, high, counts):
    """Add to ``counts`` the next digit of the key among the elements that agree with the digits so far.

    ``length`` digits are known: ``first`` and ``second`` of the magnitude, then those of the hash put together in
    ``high``; ``key`` is that of the hash's random stream. Raw arrays as in `blend`; FINE or INPUT_NOT_FINITE.
    """
    own, other = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    delta, words = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    lanes = np.empty((4, BLOCK // 4), np.uint32)
    floor = (_U32(first) << _U32(15)) | _U32(second)
    count = max(base[0].size, base[1].size)
    for begin in range(0, count, BLOCK):
        n = min(BLOCK, count - begin)
        _load(base, begin, own[:n])
        _load(expert, begin, other[:n])
        if _not_finite(own[:n]) or _not_finite(other[:n]):
            return INPUT_NOT_FINITE
        d = delta[:n]
        _subtract(other[:n].view(np.float32), own[:n].view(np.float32), d)
        if length == 0:
            _count_first(d, counts)
        elif length == 1:
            _count_second(d, _U32(first), counts)
        else:
            _words(key, start + begin, lanes, words[: (n + 3) // 4 * 4])
            _count_hashed(d, floor, words[:n], length - 2, high, key, start + begin, counts)
    return FINE
