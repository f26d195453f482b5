"""The change of one expert onto its base for many tensors at once: one loop that waits for memory only.

Nothing is said of what was changed: for the candidates of a sweep, of which only the scores count. Results are those
of `ktmerge.merge.kernels.compiled` bit for bit. They go past the caches: a line that is written whole need not be read.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic
from numba.types import int64, void

from ktmerge.merge.kernels.bits import as_bits, as_float
from ktmerge.merge.kernels.codes import BF16, BLOCK, COLUMNS, F32, FINE, OVERFLOW
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.randomness import hash_of

_U32, _U64, _F32 = np.uint32, np.uint64, np.float32
_EXPONENT = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LARGEST, _LARGEST16 = np.uint32(0x7F7FFFFF), np.uint32(0x7F7F0000)
_ALL = 1 << 60
"""Elements of an array that is all memory: addresses are its indices."""
_LINE = 16
"""Words of a line of the caches."""


@intrinsic
def _stream_line(typing, target, source):
    """Sixteen words from one address to another, a multiple of 64, past the caches."""

    def build(context, builder, signature, arguments):
        line = ir.VectorType(ir.IntType(32), _LINE).as_pointer()
        target, source = (builder.inttoptr(one, line) for one in arguments)
        stored = builder.store(builder.load(source, align=4), target, align=4 * _LINE)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return void(int64, int64), build


@intrinsic
def _fence(typing):
    """What went past the caches is there for all threads."""

    def build(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return void(), build


@compiled
def _stream(words, out):
    """Copy words; past the caches where lines are whole."""
    target, source = int64(out.ctypes.data), int64(words.ctypes.data)
    whole = words.size // _LINE * _LINE if target % (4 * _LINE) == 0 else 0
    for i in range(0, whole, _LINE):
        _stream_line(target + 4 * i, source + 4 * i)
    for i in range(whole, words.size):
        out[i] = words[i]


@compiled
def _settled(own, theirs, delta, scaled):
    """The pattern of ``theta_0 + lambda M``, as the functions of `settling` make it step by step."""
    value = theirs if scaled == delta else own + scaled
    return as_bits(own if scaled == _F32(0) else value)


@compiled
def _rounded(bits, half, odd_bit, mask):
    return _U32(_U32(bits + _U32(half + _U32(_U32(bits >> _U32(16)) & odd_bit))) & mask)


@compiled
def _add_all(base, expert, weight, lambda_, half, odd_bit, mask, out):
    """All of an expert's delta onto the base; the largest magnitude before rounding, which shows broken inputs too."""
    largest = _U32(0)
    for i in range(out.size):
        own, theirs = as_float(base[i]), as_float(expert[i])
        delta = theirs - own
        bits = _settled(own, theirs, delta, delta * weight * lambda_)
        largest = _U32(max(largest, _U32(bits & _MAGNITUDE)))
        out[i] = _rounded(bits, half, odd_bit, mask)
    return largest


@compiled
def _add_given(base, expert, given, lambda_, half, odd_bit, mask, out):
    """The same of a delta that was merged before."""
    largest = _U32(0)
    for i in range(out.size):
        own, theirs = as_float(base[i]), as_float(expert[i])
        bits = _settled(own, theirs, theirs - own, given[i] * lambda_)
        largest = _U32(max(largest, _U32(bits & _MAGNITUDE)))
        out[i] = _rounded(bits, half, odd_bit, mask)
    return largest


@compiled
def _add_trimmed(base, expert, weight, lambda_, floor, half, odd_bit, mask, out):
    """The same of an expert's magnitudes from ``floor`` on; also the largest of its magnitudes, and whether one is just
    ``floor``."""
    largest, worst, tied = _U32(0), _U32(0), False
    for i in range(out.size):
        own, theirs = as_float(base[i]), as_float(expert[i])
        delta = theirs - own
        magnitude = _U32(as_bits(delta) & _MAGNITUDE)
        worst, tied = _U32(max(worst, magnitude)), tied | (magnitude == floor)
        kept = delta if magnitude >= floor else _F32(0)
        bits = _settled(own, theirs, delta, kept * weight * lambda_)
        largest = _U32(max(largest, _U32(bits & _MAGNITUDE)))
        out[i] = _rounded(bits, half, odd_bit, mask)
    return largest, worst, tied


@compiled
def _drop_tied(base, expert, floor, least, key, start, half, odd_bit, mask, out):
    """Give back the base's value to what has just the magnitude ``floor`` and a hash below ``least``."""
    for i in range(out.size):
        own = as_float(base[i])
        if _U32(as_bits(as_float(expert[i]) - own) & _MAGNITUDE) == floor and hash_of(key, start + _U64(i)) < least:
            out[i] = _rounded(as_bits(own), half, odd_bit, mask)


@compiled
def _piece(base, expert, given, row, rates, out, scratch):
    narrow = row[2] == BF16
    half, odd_bit = (_U32(0x7FFF), _U32(1)) if narrow else (_U32(0), _U32(0))
    mask, limit = (_U32(0xFFFF0000), _LARGEST16) if narrow else (_U32(0xFFFFFFFF), _LARGEST)
    floor, least, key = _U32(row[9]), _U64(row[10]), _U64(row[11])
    fine = True
    for first in range(0, out.size, BLOCK):
        last = min(first + BLOCK, out.size)
        own, theirs, made = base[first:last], expert[first:last], scratch[: last - first]
        if given.size:
            largest = _add_given(own, theirs, given[first:last], rates[1], half, odd_bit, mask, made)
        elif floor == _U32(0):
            largest = _add_all(own, theirs, rates[0], rates[1], half, odd_bit, mask, made)
        else:
            largest, worst, tied = _add_trimmed(own, theirs, rates[0], rates[1], floor, half, odd_bit, mask, made)
            fine = fine and worst < _EXPONENT
            if tied and least:
                _drop_tied(own, theirs, floor, least, key, _U64(row[7] + first), half, odd_bit, mask, made)
        fine = fine and largest <= limit
        _stream(made, out[first:last])
    return int64(FINE) if fine else int64(OVERFLOW)


def straight(memory16, memory32, table, rates, first, last, status, scratch):
    """Blend the pieces ``first .. last`` of a table; FINE, or the worst that became of one.

    ``memory16`` and ``memory32`` are the address 0. ``table`` int64 ``[pieces, COLUMNS]``, see `codes`; base and expert
    are of type BF16 or F32, values are rounded to one of these and stored in fp32. ``rates`` fp32 ``[pieces, 2]`` are
    weight and lambda. ``status`` int64 ``[pieces]``: FINE, or OVERFLOW where an input or the result is not finite.
    ``scratch`` holds ``BLOCK`` words.
    """
    short, long = carray(memory16, (_ALL,)), carray(memory32, (_ALL,))
    pieces, numbers = carray(table, (last, COLUMNS)), carray(rates, (last, 2))
    found, made = carray(status, (last,)), carray(scratch, (BLOCK,))
    worst = int64(FINE)
    for piece in range(first, last):
        row = pieces[piece]
        own, theirs, out, count = row[3], row[4], row[5], row[6]
        target, given = long[out : out + count], long[row[8] : row[8] + (count if row[8] else 0)].view(np.float32)
        if row[0] == F32:
            base = long[own : own + count]
            if row[1] == F32:
                found[piece] = _piece(base, long[theirs : theirs + count], given, row, numbers[piece], target, made)
            else:
                found[piece] = _piece(base, short[theirs : theirs + count], given, row, numbers[piece], target, made)
        else:
            half_base = short[own : own + count]
            if row[1] == F32:
                found[piece] = _piece(
                    half_base, long[theirs : theirs + count], given, row, numbers[piece], target, made
                )
            else:
                found[piece] = _piece(
                    half_base, short[theirs : theirs + count], given, row, numbers[piece], target, made
                )
        worst = max(worst, found[piece])
    _fence()
    return worst
