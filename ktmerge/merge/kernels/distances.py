"""How far experts moved from their base, compiled by numba: sums, counts and histograms over one piece of a tensor.

Differences are taken in fp64, where those of bf16, fp16 and fp32 numbers are exact unless one is some 10**8 times the
other. Importing this loads numba and no torch; nothing here takes the interpreter's lock.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

from ktmerge.merge.kernels.bins import BINS, FINENESS, LEAST

BLOCK = 2048
"""Elements worked on at a time: a dozen arrays of them stay in the processor's first caches."""
KINDS = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
"""Codes of the types that are understood."""

_BF16, _F16, _F32 = KINDS["BF16"], KINDS["F16"], KINDS["F32"]
_SHIFT, _FIRST = 52 - FINENESS, ((1023 + LEAST) << FINENESS) - 2
_BIAS, _LARGEST, _EXPONENT, _INFINITE = 1023, 2046, 0x7FF, 0x7FF0000000000000
_U32, _LIFT = np.uint32, np.float32(2.0**112)


def _compiler(**options):
    def compiled(function):
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no folder for the machine code can be written to: make it anew every time
            return njit(nogil=True, error_model="numpy", **options)(function)

    return compiled


_compile = _compiler()
# Sums of products may be taken in any order: only their last bits differ.
_compile_sums = _compiler(fastmath={"reassoc", "nsz", "contract"})


@_compile
def _widen_bf16(raw, patterns):
    for i in range(patterns.size):
        patterns[i] = _U32(raw[i]) << _U32(16)


@_compile
def _widen_f16(raw, patterns):
    """As fp32 2**112 times too small, subnormals included; infinities and NaN as what they are."""
    for i in range(patterns.size):
        half = _U32(raw[i])
        wide = ((half & _U32(0x8000)) << _U32(16)) | ((half & _U32(0x7FFF)) << _U32(13))
        patterns[i] = wide | _U32(0x7F800000) if (half & _U32(0x7C00)) == _U32(0x7C00) else wide


@_compile
def _copy(values, out):
    for i in range(out.size):
        out[i] = values[i]


@_compile
def _lift(values, out):
    for i in range(out.size):
        out[i] = np.float64(values[i] * _LIFT)


@_compile
def _load(raw, kind, first, patterns, out):
    """Elements from ``first`` on, of the bytes ``raw``, as fp64."""
    stop = first + out.size
    if kind == _BF16:
        _widen_bf16(raw.view(np.uint16)[first:stop], patterns)
        _copy(patterns.view(np.float32), out)
    elif kind == _F16:
        _widen_f16(raw.view(np.uint16)[first:stop], patterns)
        _lift(patterns.view(np.float32), out)
    elif kind == _F32:
        _copy(raw.view(np.float32)[first:stop], out)
    else:
        _copy(raw.view(np.float64)[first:stop], out)


@_compile
def _equal_words(first, second):
    differs = first[0] ^ second[0]
    for i in range(first.size):
        differs |= first[i] ^ second[i]
    return differs == 0


@_compile
def _equal(one, other, kind, first, count):
    """Whether elements ``first .. first + count`` of two rows of one kind have the same bytes."""
    width = 2 if kind <= _F16 else (4 if kind == _F32 else 8)
    return _equal_words(one[first * width : (first + count) * width], other[first * width : (first + count) * width])


@_compile
def _silence(values):
    """Put 0 where a value is infinite or NaN; how many there were."""
    patterns = values.view(np.int64)
    count = 0
    for i in range(values.size):
        broken = (patterns[i] & _INFINITE) == _INFINITE
        count += 1 if broken else 0
        patterns[i] = 0 if broken else patterns[i]
    return count


@_compile
def _subtract(expert, base, out):
    for i in range(out.size):
        out[i] = expert[i] - base[i]


@_compile
def _per_ulp(base, least, fraction, out):
    """1 / ulp(base): the distance to the next number of a type with ``fraction`` bits and exponents from ``least``."""
    patterns, scales = base.view(np.int64), out.view(np.int64)
    for i in range(out.size):
        exponent = max((patterns[i] >> 52) & _EXPONENT, least + _BIAS)
        scales[i] = min(2 * _BIAS + fraction - exponent, _LARGEST) << 52


@_compile
def _ratios(delta, per_ulp, out):
    for i in range(out.size):
        out[i] = abs(delta[i]) * per_ulp[i]


@_compile
def _bins(patterns):
    """Turn ratios, as patterns, into their bins; the pattern of the largest."""
    largest = 0
    for i in range(patterns.size):
        ratio = patterns[i]
        largest = max(largest, ratio)
        place = min(max((ratio >> _SHIFT) - _FIRST, 1), BINS - 1)
        patterns[i] = place if ratio != 0 else 0
    return largest


@_compile
def _tally(places, histogram):
    for i in range(places.size):
        histogram[places[i]] += 1


@_compile_sums
def _dot(first, second):
    total = 0.0
    for i in range(first.size):
        total += first[i] * second[i]
    return total


@_compile
def _both(first, second):
    count = 0
    for i in range(first.size):
        count += 1 if (first[i] != 0) & (second[i] != 0) else 0
    return count


@_compile
def _opposed(first, second):
    count = 0
    for i in range(first.size):
        count += 1 if ((first[i] > 0) & (second[i] < 0)) | ((first[i] < 0) & (second[i] > 0)) else 0
    return count


@_compile
def measure(rows, kinds, count, least, fraction, broken, own, sums, largest, histograms, dots, signs):
    """Add to sums and counts what ``count`` elements of a base and its experts show.

    ``rows`` uint8 ``[1 + N, bytes]``: the base's elements and each expert's, each of its own ``kinds``; ``least`` and
    ``fraction`` are the base's type's least exponent and bits of fraction.

    Added to: ``broken`` int64 ``[1 + N]``, values that are infinite or NaN; ``own`` fp64 ``[1]``, theta_0^2; ``sums``
    fp64 ``[N, 2]``, tau^2 and tau theta_0; ``largest`` int64 ``[N]``, the largest |tau| / ulp as an fp64 pattern;
    ``histograms`` int64 ``[N, BINS]`` of these ratios; and for every two experts, in order, ``dots`` fp64 ``[P]``,
    tau_a tau_b, and ``signs`` int64 ``[P, 2]``, elements that both moved, and those in opposite directions. Where
    a value of base or expert is broken, the expert counts as unchanged.
    """
    number = sums.shape[0]
    patterns, base, finite = np.empty(BLOCK, np.uint32), np.empty(BLOCK), np.empty(BLOCK)
    per_ulp, ratios = np.empty(BLOCK), np.empty(BLOCK)
    deltas, moved = np.empty((number, BLOCK)), np.empty(number, np.bool_)
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        theta, clean, scale, ratio = base[:n], finite[:n], per_ulp[:n], ratios[:n]
        _load(rows[0], kinds[0], first, patterns[:n], theta)
        _copy(theta, clean)
        broken[0] += _silence(clean)
        own[0] += _dot(clean, clean)
        _per_ulp(clean, least, fraction, scale)
        for t in range(number):
            delta = deltas[t][:n]
            moved[t] = kinds[t + 1] != kinds[0] or not _equal(rows[0], rows[t + 1], kinds[0], first, n)
            if not moved[t]:
                histograms[t, 0] += n
                continue
            _load(rows[t + 1], kinds[t + 1], first, patterns[:n], delta)
            _subtract(delta, theta, delta)
            if _silence(delta):
                _load(rows[t + 1], kinds[t + 1], first, patterns[:n], ratio)
                broken[t + 1] += _silence(ratio)
            sums[t, 0] += _dot(delta, delta)
            sums[t, 1] += _dot(delta, clean)
            _ratios(delta, scale, ratio)
            largest[t] = max(largest[t], _bins(ratio.view(np.int64)))
            _tally(ratio.view(np.int64), histograms[t])
        pair = 0
        for a in range(number):
            for b in range(a + 1, number):
                if moved[a] and moved[b]:
                    dots[pair] += _dot(deltas[a][:n], deltas[b][:n])
                    signs[pair, 0] += _both(deltas[a][:n], deltas[b][:n])
                    signs[pair, 1] += _opposed(deltas[a][:n], deltas[b][:n])
                pair += 1
