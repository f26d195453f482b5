"""Element-wise blends compiled by numba: one pass over blocks that stay in the processor's first caches.

Equals the torch reference bit for bit: the same operations on fp32 numbers in the same order, each rounded by itself
(no fused multiply-add, no reassociation). Every loop is a function of its own over contiguous arrays, the form that
compiles to vector instructions. The entry points take bare addresses, so that their machine code can be kept on disk
and called without numba (see `ktmerge.merge.kernels.native`); nothing here takes the interpreter's lock.

All entry points read ``rows``: the base's elements and then each expert's, ``stride`` bytes apart, each of its own
``kind``. ``start`` is the index of the first element in its tensor, a multiple of 4. The transforms are
``steps`` codes, TRIM or DROP, with one number per step and expert in ``floors`` and ``leasts`` (the least magnitude
pattern that is kept, and the least hash among those that have just that), ``spans`` and ``tops`` (how many patterns
from the floor on are kept, and the least hash that is not among those that have the last of them; 0: all of them are),
``keys`` (of the random stream), ``cuts`` (random words below are kept) and ``factors`` (of what is kept).

Where the rows lie in files as they are, ``files`` and ``places`` (descriptor, and position of the first element) say so
and the kernels read them by themselves, window by window into ``rows``: what is computed on is then in the second cache
still. A first descriptor below 0 means that ``rows`` holds everything already.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit
from numba.core.types import ExternalFunction
from numba.types import CPointer, float32, float64, int32, int64, uint16, uint32, uint64, voidptr

from ktmerge.merge.kernels.codes import (
    BF16,
    BLOCK,
    DROP,
    ELECT_LARGEST,
    ELECT_MEAN,
    F16,
    F32,
    FINE,
    INPUT_NOT_FINITE,
    LARGEST,
    OVERFLOW,
    SUM,
    TRIM,
    UNREADABLE,
    WINDOW,
)  # fmt: skip
from ktmerge.merge.kernels.gathering import collect

_U32, _U64, _F32, _F64 = np.uint32, np.uint64, np.float32, np.float64
_MAGNITUDE, _EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_SIGN, _ONE, _ZERO, _INFINITY = np.uint32(0x80000000), np.uint32(1), np.float32(0), np.float32(np.inf)
_LARGEST16, _LARGEST_HALF = np.uint32(0x7F7F0000), np.uint32(0x477FE000)
_LOW = np.uint64(0xFFFFFFFF)

_compile = njit(nogil=True, error_model="numpy")
# Sums that only the report shows may be taken in any order.
_compile_sums = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})

_pread = ExternalFunction("pread", int64(int32, voidptr, uint64, int64))


@_compile
def _fill(file, position, target):
    """Bytes of a file from ``position`` on; False if it ends before, or cannot be read."""
    done = int64(0)
    while done < target.size:
        count = _pread(int32(file), target[done:].ctypes, uint64(target.size - done), int64(position + done))
        if count <= 0:
            return False
        done += count
    return True


@_compile
def _fetch(row, raw16, kinds, files, places, first, count):
    """Elements ``first .. first + count`` of one row, from its file to the beginning of its buffer."""
    width = 4 if kinds[row] == F32 else 2
    return _fill(files[row], places[row] + first * width, raw16[row].view(np.uint8)[: count * width])


@_compile
def _load_bf16(raw, out):
    worst = _U32(0)
    for i in range(out.size):
        pattern = _U32(_U32(raw[i]) << _U32(16))
        out[i] = pattern
        worst = _U32(max(worst, _U32(pattern & _EXPONENT)))
    return worst == _EXPONENT


@_compile
def _load_f32(raw, out):
    worst = _U32(0)
    for i in range(out.size):
        out[i] = raw[i]
        worst = _U32(max(worst, _U32(raw[i] & _EXPONENT)))
    return worst == _EXPONENT


@_compile
def _load_f16(raw, out):
    """As an fp32 pattern 2**112 times too small, subnormals included, which one exact product puts right."""
    values = out.view(np.float32)
    worst = _U32(0)
    for i in range(out.size):
        half = _U32(raw[i])
        worst = _U32(max(worst, _U32(half & _U32(0x7C00))))
        sign = _U32(_U32(half & _U32(0x8000)) << _U32(16))
        out[i] = _U32(sign | _U32(_U32(half & _U32(0x7FFF)) << _U32(13)))
    for i in range(out.size):
        values[i] = values[i] * _F32(2.0**112)
    return worst == _U32(0x7C00)


@_compile
def _load(kind, raw16, raw32, first, out):
    """One row's elements from ``first`` on as fp32 patterns; whether one is not finite."""
    if kind == BF16:
        return _load_bf16(raw16[first : first + out.size], out)
    if kind == F16:
        return _load_f16(raw16[first : first + out.size], out)
    return _load_f32(raw32[first : first + out.size], out)


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
def _interleave(w0, w1, w2, w3, out):
    for b in range(w0.size):
        out[4 * b], out[4 * b + 1], out[4 * b + 2], out[4 * b + 3] = w0[b], w1[b], w2[b], w3[b]


@_compile
def _words(key, start, lanes, out):
    """Random words of the elements ``start .. start + out.size``; ``start`` and the size are multiples of 4."""
    q = out.size // 4
    w0, w1, w2, w3 = lanes[:q], lanes[q : 2 * q], lanes[2 * q : 3 * q], lanes[3 * q : 4 * q]
    _philox(key, _U64(start) >> _U64(2), w0, w1, w2, w3)
    _interleave(w0, w1, w2, w3, out)


@_compile
def _hash(key, element):
    """See `ktmerge.merge.kernels.splitmix`."""
    z = key + (element + _U64(1)) * _U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


@_compile
def _subtract(expert, base, out):
    for i in range(out.size):
        out[i] = expert[i] - base[i]


@_compile
def _keep_within(delta, floor, span):
    """Zero what has a magnitude pattern outside ``[floor, floor + span)``."""
    patterns = delta.view(np.uint32)
    for i in range(delta.size):
        pattern = patterns[i]
        patterns[i] = pattern if _U32(_U32(pattern & _MAGNITUDE) - floor) < span else _U32(0)


@_compile
def _drop_hashed(delta, tied, least, key, start):
    """Zero those of the elements ``tied`` whose hash is below ``least``."""
    for j in range(tied.size):
        if _hash(key, _U64(start) + _U64(tied[j])) < least:
            delta[tied[j]] = _ZERO


@_compile
def _drop_outliers(delta, tied, top, key, start):
    """Zero those of the elements ``tied`` whose hash is ``top`` or more."""
    for j in range(tied.size):
        if _hash(key, _U64(start) + _U64(tied[j])) >= top:
            delta[tied[j]] = _ZERO


@_compile
def _drop(delta, words, cut, factor):
    for i in range(delta.size):
        delta[i] = delta[i] * factor if _U64(words[i]) < cut else _ZERO


@_compile
def _transform(step, d, start, floor, least, span, top, key, cut, factor, lanes, words):
    if step == TRIM:
        _keep_within(d, floor, span)
        if least != _U64(0):
            tied = collect(d.view(np.uint32), floor, _U32(0), words)
            _drop_hashed(d, words[:tied], least, key, start)
        if top != _U64(0):
            tied = collect(d.view(np.uint32), _U32(_U32(floor + span) - _ONE), _U32(0), words)
            _drop_outliers(d, words[:tied], top, key, start)
    elif step == DROP:
        _words(key, start, lanes, words[: (d.size + 3) // 4 * 4])
        _drop(d, words[: d.size], cut, factor)


@_compile
def _scale_into(delta, weight, total):
    for i in range(total.size):
        total[i] = delta[i] * weight


@_compile
def _add_into(delta, weight, total):
    for i in range(total.size):
        total[i] += delta[i] * weight


@_compile
def _count(patterns):
    """How many are neither zero nor minus zero."""
    count = _U32(0)
    for i in range(patterns.size):
        count = _U32(count + (_ONE if _U32(patterns[i] & _MAGNITUDE) != _U32(0) else _U32(0)))
    return int64(count)


@_compile
def _sign_into(delta, sign):
    for i in range(sign.size):
        sign[i] = _F32(1) if delta[i] > _ZERO else (_F32(-1) if delta[i] < _ZERO else _ZERO)


@_compile
def _break_ties(vote, fallback):
    for i in range(vote.size):
        vote[i] = fallback if vote[i] == _ZERO else vote[i]


@_compile
def _agree_first(delta, vote, weight, part, total, share):
    for i in range(total.size):
        agrees = ((delta[i] > _ZERO) & (vote[i] > _ZERO)) | ((delta[i] < _ZERO) & (vote[i] < _ZERO))
        total[i] = (delta[i] if agrees else _ZERO) * weight
        share[i] = (_F32(1) if agrees else _ZERO) * part


@_compile
def _agree_next(delta, vote, weight, part, total, share):
    for i in range(total.size):
        agrees = ((delta[i] > _ZERO) & (vote[i] > _ZERO)) | ((delta[i] < _ZERO) & (vote[i] < _ZERO))
        total[i] += (delta[i] if agrees else _ZERO) * weight
        share[i] += (_F32(1) if agrees else _ZERO) * part


@_compile
def _agree_most(delta, vote, total):
    """The larger of ``total`` and of the delta, if that has the elected sign; with that sign."""
    for i in range(total.size):
        above, below = max(total[i], delta[i]), min(total[i], delta[i])
        total[i] = above if vote[i] > _ZERO else (below if vote[i] < _ZERO else _ZERO)


@_compile
def _copy(values, out):
    for i in range(out.size):
        out[i] = values[i]


@_compile
def _extend(delta, high, low):
    for i in range(high.size):
        high[i] = max(high[i], delta[i])
        low[i] = min(low[i], delta[i])


@_compile
def _pick(high, low, total):
    """Of the highest and the lowest the larger in magnitude, into the highest; the sign of the total between equals."""
    for i in range(high.size):
        up, down, mass = high[i], low[i], total[i]
        even = up if mass > _ZERO else (down if mass < _ZERO else _ZERO)
        high[i] = up if up > -down else (down if up < -down else even)


@_compile
def _shrink(merged, factor):
    for i in range(merged.size):
        merged[i] = merged[i] * factor


@_compile
def _clamp(merged, limit):
    for i in range(merged.size):
        merged[i] = min(max(merged[i], -limit), limit)


@_compile
def _divide(total, share):
    for i in range(total.size):
        divisor = share[i] if share[i] > _ZERO else _F32(1)
        total[i] = total[i] / divisor if share[i] > _ZERO else _ZERO


@_compile
def _scale_and_add(merged, factor, base, out):
    for i in range(out.size):
        scaled = merged[i] * factor
        merged[i] = scaled
        out[i] = base[i] + scaled


@_compile
def _settle_expert(merged, expert, base, out):
    for i in range(out.size):
        theirs, value = expert[i], out[i]
        out[i] = theirs if merged[i] == theirs - base[i] else value


@_compile
def _settle_base(merged, base, out):
    for i in range(out.size):
        own, value = base[i], out[i]
        out[i] = own if merged[i] == _ZERO else value


@_compile
def _largest(patterns):
    worst = _U32(0)
    for i in range(patterns.size):
        worst = _U32(max(worst, _U32(patterns[i] & _MAGNITUDE)))
    return worst


@_compile
def _store_bf16(patterns, out, stored):
    for i in range(out.size):
        bits = patterns[i]
        odd = _U32(_U32(bits >> _U32(16)) & _ONE)
        short = _U32(_U32(bits + _U32(_U32(0x7FFF) + odd)) >> _U32(16))
        out[i] = uint16(short)
        stored[i] = _U32(short << _U32(16))


@_compile
def _store_bf16_stochastic(patterns, words, out, stored):
    for i in range(out.size):
        bits = patterns[i]
        carried = _U32(bits + _U32(words[i] >> _U32(16)))
        carried = bits if _U32(carried & _EXPONENT) == _EXPONENT else carried
        out[i] = uint16(_U32(carried >> _U32(16)))
        stored[i] = _U32(carried & _U32(0xFFFF0000))


@_compile
def _store_f16(patterns, out, stored):
    """To the nearest, ties to even: by integer carry where fp16 is normal; below by adding 0.5, whose ulp is fp16's."""
    small = stored.view(np.float32)
    for i in range(out.size):
        stored[i] = _U32(patterns[i] & _MAGNITUDE)
    for i in range(out.size):
        small[i] = small[i] + _F32(0.5)
    for i in range(out.size):
        magnitude, small_half = _U32(patterns[i] & _MAGNITUDE), _U32(stored[i] - _U32(0x3F000000))
        odd = _U32(_U32(magnitude >> _U32(13)) & _ONE)
        normal = _U32(_U32(magnitude + _U32(_U32(0xC8000FFF) + odd)) >> _U32(13))
        half = normal if magnitude >= _U32(0x38800000) else small_half
        out[i] = uint16(_U32(half | _U32(_U32(patterns[i] & _SIGN) >> _U32(16))))


@_compile
def _store(kind, stochastic, patterns, words, out16, out32, stored):
    """Round once; whether a value is beyond the type. Leaves what was stored as fp32 patterns in ``stored``."""
    if kind == F32:
        return _load_f32(patterns, out32) or _load_f32(patterns, stored)
    worst = _largest(patterns)
    if kind == F16:
        if worst <= _LARGEST_HALF:
            _store_f16(patterns, out16, stored)
            _load_f16(out16, stored)
        return worst > _LARGEST_HALF
    if stochastic:
        _store_bf16_stochastic(patterns, words, out16, stored)
    else:
        _store_bf16(patterns, out16, stored)
    return worst > _LARGEST16


@_compile_sums
def _sum_up(base, merged, stored, sums):
    intended, own, along = _F64(0), _F64(0), _F64(0)
    changed = int64(0)
    for i in range(base.size):
        moved = stored[i] - base[i]
        intended += _F64(merged[i]) * _F64(merged[i])
        own += _F64(base[i]) * _F64(base[i])
        along += _F64(moved) * _F64(merged[i])
        changed += 1 if moved != _ZERO else 0
    sums[0] += intended
    sums[1] += own
    sums[2] += along
    sums[3] += changed


@_compile
def _elect(combine, counted, votes, weights, shares, fallback, delta, vote, share, merged):
    """The experts' deltas that have the elected sign: their weighted mean or sum, or the largest of them."""
    n = merged.size
    for t in range(votes.size):
        d = delta[t][:n]
        if counted:
            _sign_into(d, share)
            d = share
        if t == 0:
            _scale_into(d, votes[0], vote)
        else:
            _add_into(d, votes[t], vote)
    if fallback != _ZERO:
        _break_ties(vote, fallback)
    if combine == ELECT_LARGEST:
        merged[:] = _ZERO
        for t in range(votes.size):
            _agree_most(delta[t][:n], vote, merged)
        return
    _agree_first(delta[0][:n], vote, weights[0], shares[0], merged, share)
    for t in range(1, votes.size):
        _agree_next(delta[t][:n], vote, weights[t], shares[t], merged, share)
    if combine == ELECT_MEAN:
        _divide(merged, share)


@_compile
def _merge(
    raw16, raw32, kinds, start, first, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, fallback, kept, theta, delta, lanes, words, v, share, m,
):  # fmt: skip
    """The merged delta of the elements of the piece from ``first`` on into ``m``, and base and experts into ``theta``;
    the rows begin with the piece's element ``origin``. Whether an input is not finite."""
    n = m.size
    own = theta[0][:n]
    if _load(kinds[0], raw16[0], raw32[0], first - origin, own):
        return True
    for t in range(kept.size):
        d, other, weight = delta[t][:n], theta[t + 1][:n], rates[1][t]
        if _load(kinds[t + 1], raw16[t + 1], raw32[t + 1], first - origin, other):
            return True
        _subtract(other.view(np.float32), own.view(np.float32), d)
        for s in range(steps.size):
            _transform(
                steps[s], d, start + first, floors[s][t], leasts[s][t], spans[s][t], tops[s][t], keys[s][t], cuts[s][t],
                factors[s][t], lanes, words,
            )  # fmt: skip
        if steps.size:
            kept[t] += _count(d.view(np.uint32))
        if combine == LARGEST:
            _shrink(d, weight)
            if t == 0:
                _copy(d, m)
                _copy(d, share)
                _copy(d, v)
            else:
                _extend(d, m, share)
                _add_into(d, _F32(1), v)
        elif combine == SUM:
            if t == 0:
                _scale_into(d, weight, m)
            else:
                _add_into(d, weight, m)
    if combine == LARGEST:
        _pick(m, share, v)
    elif combine != SUM:
        _elect(combine, counted, rates[0], rates[1], rates[2], fallback, delta, v, share, m)
    return False


@_compile
def _blend(
    raw16, raw32, kinds, start, begin, end, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, ends, kind, stochastic, round_key, out16, out32, sums, kept,
    theta, delta, lanes, words, vote, share, merged, values,
):  # fmt: skip
    """The elements from ``begin`` to ``end`` of the piece; the rows begin with its element ``origin``."""
    number = kept.size
    fallback, factor, limit, lambda_ = ends[0], ends[1], ends[2], ends[3]
    status = int64(FINE)
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        m, r = merged[:n], values[:n]
        if _merge(
            raw16, raw32, kinds, start, first, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
            combine, counted, rates, fallback, kept, theta, delta, lanes, words, vote[:n], share[:n], m,
        ):  # fmt: skip
            return int64(INPUT_NOT_FINITE)
        theta0 = theta[0][:n].view(np.float32)
        if factor != _F32(1):
            _shrink(m, factor)
        if limit < _INFINITY:
            _clamp(m, limit)
        _scale_and_add(m, lambda_, theta0, r)
        for t in range(number - 1, -1, -1):
            _settle_expert(m, theta[t + 1][:n].view(np.float32), theta0, r)
        _settle_base(m, theta0, r)
        if stochastic:
            _words(round_key, start + first, lanes, words[: (n + 3) // 4 * 4])
        stored = vote[:n].view(np.uint32)
        to16, to32 = out16[first : first + n], out32[first : first + n]
        if _store(kind, stochastic, r.view(np.uint32), words[:n], to16, to32, stored):
            status = int64(OVERFLOW)
        _sum_up(theta0, m, stored.view(np.float32), sums)
    return status


@_compile
def _fetch_all(raw16, kinds, files, places, first, count):
    """So many elements of every row, from their files; False if one cannot be read."""
    whole = True
    for row in range(kinds.size):
        whole = whole and _fetch(row, raw16, kinds, files, places, first, count)
    return whole


def blend(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, combine, counted, rates, ends, kind, stochastic, round_key, out16, out32, sums, kept, scratch,
):  # fmt: skip
    """Blend ``count`` elements; FINE, INPUT_NOT_FINITE, OVERFLOW or UNREADABLE.

    ``rates`` are votes, weights and shares, ``[3, N]``. ``combine`` is SUM of weights times deltas; LARGEST, of weights
    times deltas the largest magnitude; or ELECT_*, of those deltas that have the sign of the sum of votes times deltas
    (if ``counted``, times the deltas' signs): the sum of weights times deltas over that of shares, the former alone, or
    the largest. ``ends``, ``[4]``: the vote where that is 0; of the merged delta a factor, a cap on its magnitudes, and
    a last factor.
    The result is stored as ``kind``, rounded to the nearest or stochastically. Added to: ``sums`` fp64 ``[4]``, squared
    norms of merged delta and base, inner product of the former with what was stored, number of changed elements;
    ``kept`` int64 ``[N]``, non-zeros after the transforms. ``scratch`` holds ``BLOCK * (2 N + 7)`` words.
    """
    raw16 = carray(rows16, (number + 1, stride // 2))
    raw32 = carray(rows32, (number + 1, stride // 4))
    own_kinds, own_files, own_places = (
        carray(kinds, (number + 1,)),
        carray(files, (number + 1,)),
        carray(places, (number + 1,)),
    )
    per_step = (step_count, number)
    work = carray(scratch, (2 * number + 7, BLOCK))
    floats = work.view(np.float32)
    halves, words = (0, count) if kind == F32 else (count, 0)
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    worst = int64(FINE)
    for begin in range(0, count, window):
        end = min(begin + window, count)
        origin = begin if fetched else 0
        if fetched and not _fetch_all(raw16, own_kinds, own_files, own_places, begin, end - begin):
            return int64(UNREADABLE)
        status = _blend(
            raw16, raw32, own_kinds, start, begin, end, origin,
            carray(steps, (step_count,)), carray(floors, per_step), carray(leasts, per_step), carray(spans, per_step),
            carray(tops, per_step), carray(keys, per_step), carray(cuts, per_step), carray(factors, per_step),
            combine, counted, carray(rates, (3, number)), carray(ends, (4,)), kind, stochastic, round_key,
            carray(out16, (halves,)), carray(out32, (words,)), carray(sums, (4,)), carray(kept, (number,)),
            work[: number + 1], floats[number + 1 : 2 * number + 1], work[2 * number + 1], work[2 * number + 6],
            floats[2 * number + 2], floats[2 * number + 3], floats[2 * number + 4], floats[2 * number + 5],
        )  # fmt: skip
        if status == INPUT_NOT_FINITE:
            return status
        worst = max(worst, status)
    return worst


@_compile
def _add_squares(patterns, high, low):
    """Squares of 24-bit mantissas by exponent, in two halves of 24 bits, so that sums are exact."""
    for i in range(patterns.size):
        exponent = _U32(_U32(patterns[i] >> _U32(23)) & _U32(0xFF))
        mantissa = _U64(patterns[i] & _U32(0x7FFFFF)) + (_U64(1 << 23) if exponent else _U64(0))
        square = mantissa * mantissa
        place = max(exponent, _ONE)
        high[place] += square >> _U64(24)
        low[place] += square & _U64(0xFFFFFF)


@_compile
def _squares(
    raw16, raw32, kinds, start, begin, end, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, fallback, bins, kept, theta, delta, lanes, words, vote, share, merged,
):  # fmt: skip
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        m = merged[:n]
        if _merge(
            raw16, raw32, kinds, start, first, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
            combine, counted, rates, fallback, kept, theta, delta, lanes, words, vote[:n], share[:n], m,
        ):  # fmt: skip
            return int64(INPUT_NOT_FINITE)
        _add_squares(theta[0][:n], bins[0][0], bins[0][1])
        _add_squares(m.view(np.uint32), bins[1][0], bins[1][1])
    return int64(FINE)


def squares(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, combine, counted, rates, fallback, bins, kept, scratch,
):  # fmt: skip
    """Add the squares of up to 2**40 elements of base and merged delta to ``bins`` uint64 ``[2, 2, 256]``; FINE,
    INPUT_NOT_FINITE or UNREADABLE.

    By exponent; of the squared 24-bit mantissas first the upper and then the lower 24 bits. Else as `blend`.
    """
    raw16 = carray(rows16, (number + 1, stride // 2))
    raw32 = carray(rows32, (number + 1, stride // 4))
    own_kinds, own_files, own_places = (
        carray(kinds, (number + 1,)),
        carray(files, (number + 1,)),
        carray(places, (number + 1,)),
    )
    per_step = (step_count, number)
    work = carray(scratch, (2 * number + 7, BLOCK))
    floats = work.view(np.float32)
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    for begin in range(0, count, window):
        end = min(begin + window, count)
        origin = begin if fetched else 0
        if fetched and not _fetch_all(raw16, own_kinds, own_files, own_places, begin, end - begin):
            return int64(UNREADABLE)
        status = _squares(
            raw16, raw32, own_kinds, start, begin, end, origin,
            carray(steps, (step_count,)), carray(floors, per_step), carray(leasts, per_step), carray(spans, per_step),
            carray(tops, per_step), carray(keys, per_step), carray(cuts, per_step), carray(factors, per_step),
            combine, counted, carray(rates, (3, number)), fallback, carray(bins, (2, 2, 256)), carray(kept, (number,)),
            work[: number + 1], floats[number + 1 : 2 * number + 1], work[2 * number + 1], work[2 * number + 6],
            floats[2 * number + 2], floats[2 * number + 3], floats[2 * number + 4],
        )  # fmt: skip
        if status != FINE:
            return status
    return int64(FINE)


@_compile
def _count_above(magnitudes, high):
    count = _U32(0)
    for i in range(magnitudes.size):
        count = _U32(count + (_ONE if magnitudes[i] > high else _U32(0)))
    return count


@_compile
def _count_magnitudes(magnitudes, found, low, shift, counts, lows):
    rest = _U32(_U32(_ONE << shift) - _ONE)
    for j in range(found.size):
        inside = _U32(magnitudes[found[j]] - low)
        counts[inside >> shift] += _ONE
        lows[inside >> shift] |= inside & rest


@_compile
def _note(magnitudes, found, first, places, patterns):
    for j in range(found.size):
        places[j] = _U32(first + found[j])
        patterns[j] = magnitudes[found[j]]


@_compile
def _count_hash(value, low, last, shift, counts):
    """Count a hash in its bin; 1 if it is above all bins, else 0."""
    if value < low:
        return _U32(0)
    inside = value - low
    if inside > last:
        return _ONE
    counts[inside >> shift] += _ONE
    return _U32(0)


@_compile
def _count_hashes(found, key, start, low, last, shift, counts):
    above = _U32(0)
    for j in range(found.size):
        above += _count_hash(_hash(key, _U64(start) + _U64(found[j])), low, last, shift, counts)
    return above


@_compile
def _magnitudes(delta):
    patterns = delta.view(np.uint32)
    for i in range(delta.size):
        patterns[i] = _U32(patterns[i] & _MAGNITUDE)


@_compile
def _delta(
    raw16, raw32, kinds, row, first, start, steps, floors, leasts, spans, tops, keys, cuts, factors, own, other, d,
    lanes, words,
):  # fmt: skip
    """One expert's delta after the transforms, elements ``first .. first + d.size`` of the rows, whose first element is
    ``start`` in the tensor; whether one is not finite. ``own`` holds the base's."""
    t = row - 1
    if _load(kinds[row], raw16[row], raw32[row], first, other[: d.size]):
        return True
    _subtract(other[: d.size].view(np.float32), own[: d.size].view(np.float32), d)
    for s in range(steps.size):
        _transform(
            steps[s],
            d,
            start + first,
            floors[s][t],
            leasts[s][t],
            spans[s][t],
            tops[s][t],
            keys[s][t],
            cuts[s][t],
            factors[s][t],
            lanes,
            words,
        )
    return False


@_compile
def _measure(
    raw16, raw32, kinds, wanted, start, origin, count, steps, floors, leasts, spans, tops, keys, cuts, factors,
    searches, counts, lows, places, patterns, taken, own, other, delta, lanes, words,
):  # fmt: skip
    """``count`` elements of the rows, which begin with element ``origin`` of the piece."""
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        d = delta[:n]
        if _load(kinds[0], raw16[0], raw32[0], first, own[:n]):
            return int64(INPUT_NOT_FINITE)
        for w in range(wanted.size):
            known = w > 0 and wanted[w] == wanted[w - 1]
            if not known and _delta(
                raw16, raw32, kinds, wanted[w], first, start + origin, steps, floors, leasts, spans, tops, keys, cuts,
                factors, own, other, d, lanes, words,
            ):  # fmt: skip
                return int64(INPUT_NOT_FINITE)
            hashed, floor, key, low = searches[w][0], _U32(searches[w][1]), searches[w][2], searches[w][3]
            last, shift, bins, room = searches[w][4], searches[w][5], int64(searches[w][6]), int64(searches[w][7])
            _magnitudes(d)
            magnitudes = d.view(np.uint32)
            if hashed:
                tied = words[: collect(magnitudes, floor, _U32(0), words)]
                above = _count_hashes(tied, key, start + origin + first, low, last, shift, counts[w])
            else:
                high = low + last
                above = _count_above(magnitudes, _U32(high)) if high < _U64(_MAGNITUDE) else _U32(0)
                near = words[: collect(magnitudes, _U32(low), _U32(last), words)]
                _count_magnitudes(magnitudes, near, _U32(low), _U32(shift), counts[w], lows[w])
                noted = taken[w] + near.size
                if noted <= room:
                    _note(magnitudes, near, origin + first, places[w][taken[w] : noted], patterns[w][taken[w] : noted])
                taken[w] = noted
            counts[w][bins] += above
    return int64(FINE)


def measure(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, wanted_count, wanted, searches, width, counts, lows, capacity, noted, patterns, taken, scratch,
):  # fmt: skip
    """Count the keys of some rows' deltas, as they are after the transforms; FINE, INPUT_NOT_FINITE or UNREADABLE.

    ``wanted`` int64 are those rows, one several times in a row if several things of it are to be counted;
    ``searches`` uint64 ``[wanted, 8]`` what to count: hashed, floor, key, low, last, shift, bins, room.
    The key is the magnitude's pattern, or if ``hashed`` the hash, by ``key``, of the elements whose magnitude is
    ``floor``. Added to: ``counts`` uint32 ``[wanted, width + 1]``, keys in ``[low, low + last]`` by
    ``(key - low) >> shift``, and keys above all that in number ``bins``; ``lows`` uint32 ``[wanted, width]``, the union
    of the bits that magnitudes lose in that shift. Of the magnitudes in the interval ``noted`` and ``patterns``, both
    uint32 ``[wanted, capacity]``, take index in the piece and pattern of up to ``room``; ``taken`` int64 ``[wanted]``
    counts them, also those for which there was no room. ``scratch`` holds ``BLOCK * 5`` words.
    """
    raw16 = carray(rows16, (number + 1, stride // 2))
    raw32 = carray(rows32, (number + 1, stride // 4))
    own_kinds, own_files, own_places = (
        carray(kinds, (number + 1,)),
        carray(files, (number + 1,)),
        carray(places, (number + 1,)),
    )
    own_wanted = carray(wanted, (wanted_count,))
    per_step = (step_count, number)
    work = carray(scratch, (5, BLOCK))
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    for begin in range(0, count, window):
        size = min(window, count - begin)
        if fetched:
            if not _fetch(0, raw16, own_kinds, own_files, own_places, begin, size):
                return int64(UNREADABLE)
            for w in range(wanted_count):
                known = w > 0 and own_wanted[w] == own_wanted[w - 1]
                if not known and not _fetch(own_wanted[w], raw16, own_kinds, own_files, own_places, begin, size):
                    return int64(UNREADABLE)
        status = _measure(
            raw16, raw32, own_kinds, own_wanted, start, begin, size,
            carray(steps, (step_count,)), carray(floors, per_step), carray(leasts, per_step), carray(spans, per_step),
            carray(tops, per_step), carray(keys, per_step), carray(cuts, per_step), carray(factors, per_step),
            carray(searches, (wanted_count, 8)), carray(counts, (wanted_count, width + 1)),
            carray(lows, (wanted_count, width)), carray(noted, (wanted_count, capacity)),
            carray(patterns, (wanted_count, capacity)), carray(taken, (wanted_count,)),
            work[0], work[1], work[2].view(np.float32), work[3], work[4],
        )  # fmt: skip
        if status != FINE:
            return status
    return int64(FINE)


def sample(
    rows16, rows32, stride, kinds, number, row, count, start, step_count, steps, floors, leasts, spans, tops, keys,
    cuts, factors, out, scratch,
):  # fmt: skip
    """The magnitude patterns of up to ``BLOCK`` deltas of one expert into ``out``; FINE or INPUT_NOT_FINITE."""
    per_step = (step_count, number)
    work = carray(scratch, (4, BLOCK))
    patterns = carray(out, (count,))
    d = patterns.view(np.float32)
    raw16, raw32 = carray(rows16, (number + 1, stride // 2)), carray(rows32, (number + 1, stride // 4))
    own_kinds = carray(kinds, (number + 1,))
    if _load(own_kinds[0], raw16[0], raw32[0], 0, work[0][:count]) or _delta(
        raw16, raw32, own_kinds, row, 0, start,
        carray(steps, (step_count,)), carray(floors, per_step), carray(leasts, per_step), carray(spans, per_step),
        carray(tops, per_step), carray(keys, per_step), carray(cuts, per_step), carray(factors, per_step),
        work[0], work[1], d, work[2], work[3],
    ):  # fmt: skip
        return int64(INPUT_NOT_FINITE)
    _magnitudes(d)
    return int64(FINE)


@_compile
def _tally(places, patterns, floor, key, start, low, last, shift, counts):
    above = _U32(0)
    for j in range(places.size):
        if patterns[j] == floor:
            above += _count_hash(_hash(key, _U64(start) + _U64(places[j])), low, last, shift, counts)
    counts[counts.size - 1] += above


def tally(places, patterns, noted, floor, key, start, low, last, shift, bins, counts):
    """Of ``noted`` elements that `measure` noted, count the hashes of those with the magnitude ``floor``; FINE.

    Added to ``counts`` uint32 ``[bins + 1]``: hashes in ``[low, low + last]`` by ``(hash - low) >> shift``, and those
    above all that in the last.
    """
    size = (noted,)
    _tally(
        carray(places, size), carray(patterns, size), floor, key, start, low, last, shift, carray(counts, (bins + 1,))
    )
    return int64(FINE)


@_compile_sums
def _energy(values):
    total = _F64(0)
    for i in range(values.size):
        total += _F64(values[i]) * _F64(values[i])
    return total


@_compile
def _energies(kind, raw16, raw32, count, sums, work):
    for first in range(0, count, BLOCK):
        own = work[: min(BLOCK, count - first)]
        if _load(kind, raw16, raw32, first, own):
            return int64(INPUT_NOT_FINITE)
        sums[1] += _energy(own.view(np.float32))
    return int64(FINE)


def energy(rows16, rows32, kind, count, sums, scratch):
    """Add the base's squared norm to ``sums[1]``; FINE or INPUT_NOT_FINITE."""
    halves, words = (0, count) if kind == F32 else (count, 0)
    return _energies(kind, carray(rows16, (halves,)), carray(rows32, (words,)), count, sums, carray(scratch, (BLOCK,)))


_ROWS = [CPointer(uint16), CPointer(uint32), int64, CPointer(int64), int64]
_FILES = [CPointer(int64), CPointer(int64)]
_STEPS = [
    int64, CPointer(int64), CPointer(uint32), CPointer(uint64), CPointer(uint32), CPointer(uint64), CPointer(uint64),
    CPointer(uint64), CPointer(float32),
]  # fmt: skip
_COMBINE = [int64, int64, CPointer(float32)]

ENTRIES: dict[str, tuple[Any, Any]] = {
    "blend": (
        blend,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, *_COMBINE, CPointer(float32), int64, int64, uint64,
            CPointer(uint16), CPointer(uint32), CPointer(float64), CPointer(int64), CPointer(uint32),
        ),
    ),
    "squares": (
        squares,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, *_COMBINE, float32, CPointer(uint64), CPointer(int64),
            CPointer(uint32),
        ),
    ),
    "measure": (
        measure,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, int64, CPointer(int64), CPointer(uint64), int64, CPointer(uint32),
            CPointer(uint32), int64, CPointer(uint32), CPointer(uint32), CPointer(int64), CPointer(uint32),
        ),
    ),
    "tally": (
        tally,
        int64(
            CPointer(uint32), CPointer(uint32), int64, uint32, uint64, int64, uint64, uint64, uint64, int64,
            CPointer(uint32),
        ),
    ),
    "sample": (sample, int64(*_ROWS, int64, int64, int64, *_STEPS, CPointer(uint32), CPointer(uint32))),
    "energy": (energy, int64(CPointer(uint16), CPointer(uint32), int64, int64, CPointer(float64), CPointer(uint32))),
}  # fmt: skip
"""Entry points by name, each with its signature."""
