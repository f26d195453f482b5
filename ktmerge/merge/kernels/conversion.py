"""Raw elements to fp32 patterns, and fp32 to raw elements, rounded once.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba.types import uint16

from ktmerge.merge.kernels.codes import BF16, F16, F32
from ktmerge.merge.kernels.compiler import compiled, inlined

_U32, _F32 = np.uint32, np.float32
_MAGNITUDE = np.uint32(0x7FFFFFFF)
EXPONENT = np.uint32(0x7F800000)
_SIGN = np.uint32(0x80000000)
_ONE = np.uint32(1)
_LARGEST16 = np.uint32(0x7F7F0000)
_LARGEST_HALF = np.uint32(0x477FE000)


@compiled
def load_bf16(raw, out):
    """Whether one is not finite."""
    worst = _U32(0)
    for i in range(out.size):
        pattern = _U32(_U32(raw[i]) << _U32(16))
        out[i] = pattern
        worst = _U32(max(worst, _U32(pattern & EXPONENT)))
    return worst == EXPONENT


@compiled
def _load_f32(raw, out):
    worst = _U32(0)
    for i in range(out.size):
        out[i] = raw[i]
        worst = _U32(max(worst, _U32(raw[i] & EXPONENT)))
    return worst == EXPONENT


@compiled
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


@inlined
def load(kind, raw16, raw32, first, out):
    """One row's elements from ``first`` on as fp32 patterns; whether one is not finite."""
    if kind == BF16:
        return load_bf16(raw16[first : first + out.size], out)
    if kind == F16:
        return _load_f16(raw16[first : first + out.size], out)
    return _load_f32(raw32[first : first + out.size], out)


@compiled
def largest(patterns):
    """The largest magnitude."""
    worst = _U32(0)
    for i in range(patterns.size):
        worst = _U32(max(worst, _U32(patterns[i] & _MAGNITUDE)))
    return worst


@compiled
def _store_bf16(patterns, out, stored):
    for i in range(out.size):
        bits = patterns[i]
        odd = _U32(_U32(bits >> _U32(16)) & _ONE)
        short = _U32(_U32(bits + _U32(_U32(0x7FFF) + odd)) >> _U32(16))
        out[i] = uint16(short)
        stored[i] = _U32(short << _U32(16))


@compiled
def _store_bf16_stochastic(patterns, words, out, stored):
    for i in range(out.size):
        bits = patterns[i]
        carried = _U32(bits + _U32(words[i] >> _U32(16)))
        carried = bits if _U32(carried & EXPONENT) == EXPONENT else carried
        out[i] = uint16(_U32(carried >> _U32(16)))
        stored[i] = _U32(carried & _U32(0xFFFF0000))


@compiled
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


@inlined
def store(kind, stochastic, patterns, words, out16, out32, stored):
    """Round once; whether a value is beyond the type. Leaves what was stored as fp32 patterns in ``stored``."""
    if kind == F32:
        return _load_f32(patterns, out32) or _load_f32(patterns, stored)
    worst = largest(patterns)
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
