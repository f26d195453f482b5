"""The change of one expert, or one that was merged before, onto the base: one loop that waits for memory only.

Nothing is said of what was changed: for the candidates of a sweep, of which only the scores count. Results are those
of `ktmerge.merge.kernels.compiled` bit for bit. They go past the caches: a line that is written whole need not be read.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit
from numba.extending import intrinsic
from numba.types import int64, uint16, void

from ktmerge.merge.kernels.bits import as_bits, as_float
from ktmerge.merge.kernels.codes import BF16, COLUMNS, F16, F32, FINE, OVERFLOW, STRIP
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.conversion import load, store
from ktmerge.merge.kernels.gathering import collect
from ktmerge.merge.kernels.randomness import judge, random_words

_U32, _U64, _F32 = np.uint32, np.uint64, np.float32
_EXPONENT = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LARGEST, _LARGEST16 = np.uint32(0x7F7FFFFF), np.uint32(0x7F7F0000)
_ALL = 1 << 60
"""Elements of an array that is all memory: addresses are its indices."""
_LINE = 64
"""Bytes of a line of the caches."""
# A call that hands on a few arrays takes as long as a strip.
_folded = njit(nogil=True, error_model="numpy", forceinline=True)
# Columns of the table, see `codes`.
_BASE, _EXPERT, _KIND, _TARGET, _OWN, _THEIRS, _OUT, _COUNT, _START = 0, 1, 2, 3, 4, 5, 6, 7, 8
_GIVEN, _FLOOR, _LEAST, _HASH, _STOCHASTIC, _ROUND, _INEXACT, _INEXACTS, _VALUES = 9, 10, 11, 12, 13, 14, 15, 16, 17


@intrinsic
def _stream_line(typing, target, source):
    """A line from one address to another, a multiple of its length, past the caches."""

    def build(context, builder, signature, arguments):
        line = ir.VectorType(ir.IntType(32), _LINE // 4).as_pointer()
        target, source = (builder.inttoptr(one, line) for one in arguments)
        stored = builder.store(builder.load(source, align=4), target, align=_LINE)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return void(int64, int64), build


@intrinsic
def _put(typing, target, value):
    """A number to an address, a multiple of its width."""

    def build(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], arguments[1].type.as_pointer()))
        return context.get_dummy_value()

    return void(int64, value), build


@intrinsic
def _fence(typing):
    """What went past the caches is there for all threads."""

    def build(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return void(), build


@_folded
def _stream(words, target):
    """Copy words to an address; past the caches where lines are whole."""
    width, source = words.itemsize, int64(words.ctypes.data)
    before = min(words.size, int64(-target % _LINE) // width)
    after = before + (words.size - before) // (_LINE // width) * (_LINE // width)
    for i in range(before):
        _put(target + width * i, words[i])
    for i in range(width * before, width * after, _LINE):
        _stream_line(target + i, source + i)
    for i in range(after, words.size):
        _put(target + width * i, words[i])


@_folded
def _settled(own, theirs, delta, scaled):
    """The pattern of ``theta_0 + lambda M``, as the functions of `settling` make it step by step."""
    value = theirs if scaled == delta else own + scaled
    return as_bits(own if scaled == _F32(0) else value)


@_folded
def _rounded(bits, half, odd_bit, mask):
    return _U32(_U32(bits + _U32(half + _U32(_U32(bits >> _U32(16)) & odd_bit))) & mask)


@_folded
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


@_folded
def _add_given(base, given, lambda_, half, odd_bit, mask, out):
    """The same of a delta that was merged before, where `_set_inexact` has nothing to say."""
    largest = _U32(0)
    for i in range(out.size):
        own = as_float(base[i])
        scaled = given[i] * lambda_
        bits = as_bits(own if scaled == _F32(0) else own + scaled)
        largest = _U32(max(largest, _U32(bits & _MAGNITUDE)))
        out[i] = _rounded(bits, half, odd_bit, mask)
    return largest


@compiled
def _set_inexact(base, given, lambda_, half, odd_bit, mask, out, first, places, values, experts):
    """Let what is an expert's delta make that expert's value, at the places where adding it to the base does not.

    ``first`` is the index of the first element; ``values`` ``[places * N]`` are the experts'. Returns how many of the
    places are before the end.
    """
    count = 0
    while count < places.size and places[count] < first + out.size:
        i = places[count] - first
        own, scaled = as_float(base[i]), given[i] * lambda_
        for t in range(experts - 1, -1, -1):
            theirs = values[count * experts + t]
            if scaled == as_float(theirs) - own and scaled != _F32(0):
                out[i] = _rounded(theirs, half, odd_bit, mask)
        count += 1
    return count


@_folded
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
def _drop_tied(base, expert, floor, least, key, start, half, odd_bit, mask, patterns, tied, out):
    """Give back the base's value to what has just the magnitude ``floor`` and a hash below ``least``."""
    for i in range(out.size):
        patterns[i] = as_bits(as_float(expert[i]) - as_float(base[i]))
    ties = tied[: collect(patterns, floor, _U32(0), tied)]
    masks = patterns[: ties.size]
    judge(ties, least, key, start, masks)
    for j in range(ties.size):
        i = ties[j]
        own = _rounded(as_bits(as_float(base[i])), half, odd_bit, mask)
        out[i] = _U32(_U32(out[i] & masks[j]) | _U32(own & _U32(~masks[j])))


@compiled
def _round_otherwise(made, first, row, target, work):
    """Round stochastically or to fp16, and write it; whether it fits into its type."""
    halves, stored, words = work[1].view(np.uint16)[: made.size], work[2][: made.size], work[3]
    if row[_STOCHASTIC]:
        random_words(_U64(row[_ROUND]), row[_START] + first, made.size, words)
    if store(row[_KIND], row[_STOCHASTIC] != 0, made, words[: made.size], halves, stored, stored):
        return False
    if row[_TARGET] == F32:
        _stream(stored, target + 4 * first)
    else:
        _stream(halves, target + 2 * first)
    return True


@_folded
def _write_halves(made, work, target):
    """The upper halves of patterns."""
    halves = work[1].view(np.uint16)[: made.size]
    for i in range(made.size):
        halves[i] = uint16(made[i] >> _U32(16))
    _stream(halves, target)


@compiled
def _piece(base, expert, given, row, rates, places, values, experts, work):
    narrow = row[_KIND] == BF16
    nearest = narrow and row[_STOCHASTIC] == 0
    half, odd_bit = (_U32(0x7FFF), _U32(1)) if nearest else (_U32(0), _U32(0))
    mask, limit = _U32(0xFFFF0000) if nearest else _U32(0xFFFFFFFF), _LARGEST16 if narrow else _LARGEST
    floor, least, key = _U32(row[_FLOOR]), _U64(row[_LEAST]), _U64(row[_HASH])
    wide, otherwise = row[_TARGET] == F32, row[_KIND] == F16 or row[_STOCHASTIC] != 0
    target, start = row[_OUT] * (4 if wide else 2), row[_START]
    done, fine = 0, True
    for first in range(0, base.size, STRIP):
        last = min(first + STRIP, base.size)
        own, made = base[first:last], work[0][: last - first]
        if given.size:
            merged = given[first:last]
            largest = _add_given(own, merged, rates[1], half, odd_bit, mask, made)
            if done < places.size:
                done += _set_inexact(
                    own, merged, rates[1], half, odd_bit, mask, made, start + first, places[done:],
                    values[done * experts :], experts,
                )  # fmt: skip
        elif floor == _U32(0):
            largest = _add_all(own, expert[first:last], rates[0], rates[1], half, odd_bit, mask, made)
        else:
            theirs = expert[first:last]
            largest, worst, tied = _add_trimmed(own, theirs, rates[0], rates[1], floor, half, odd_bit, mask, made)
            fine = fine and worst < _EXPONENT
            if tied and least:
                _drop_tied(
                    own, theirs, floor, least, key, _U64(start + first), half, odd_bit, mask, work[1][: made.size],
                    work[2][: made.size], made,
                )  # fmt: skip
        fine = fine and largest <= limit
        if otherwise:
            fine = _round_otherwise(made, first, row, target, work) and fine
        elif wide:
            _stream(made, target + 4 * first)
        else:
            _write_halves(made, work, target + 2 * first)
    return int64(FINE) if fine else int64(OVERFLOW)


@compiled
def _with_expert(short, long, base, given, row, rates, places, values, experts, work, wide):
    """The piece, given the base's elements."""
    theirs, count = row[_THEIRS], row[_COUNT]
    if row[_EXPERT] == BF16:
        return _piece(base, short[theirs : theirs + count], given, row, rates, places, values, experts, work)
    if row[_EXPERT] == F16 and not given.size:
        load(F16, short, long, theirs, wide[:count])
        return _piece(base, wide[:count], given, row, rates, places, values, experts, work)
    return _piece(base, long[theirs : theirs + count], given, row, rates, places, values, experts, work)


def multi_tensor(memory16, memory32, table, rates, experts, first, last, wide, status, scratch):
    """Blend the pieces ``first .. last`` of a table, of any number of tensors; FINE, or the worst that became of one.

    ``memory16`` and ``memory32`` are the address 0. ``table`` int64 ``[pieces, COLUMNS]``, see `codes`; ``rates`` fp32
    ``[pieces, 2]`` are weight and lambda. ``experts`` N is how many values there are at each inexact place. ``status``
    int64 ``[pieces]``: FINE, or OVERFLOW where an input or the result is not finite. ``scratch`` holds ``4 * STRIP + 2
    * wide`` words, where no piece has more than ``wide`` elements.
    """
    short, long = carray(memory16, (_ALL,)), carray(memory32, (_ALL,))
    pieces, numbers, found = carray(table, (last, COLUMNS)), carray(rates, (last, 2)), carray(status, (last,))
    work, room = carray(scratch, (4, STRIP)), carray(scratch, (4 * STRIP + 2 * wide,))[4 * STRIP :]
    worst = int64(FINE)
    for piece in range(first, last):
        row, own = pieces[piece], numbers[piece]
        base, count, begin = row[_OWN], row[_COUNT], row[_GIVEN]
        given = long[begin : begin + (count if begin else 0)].view(np.float32)
        inexact, inexacts, firsts = row[_INEXACT], row[_INEXACTS] if begin else 0, row[_VALUES]
        places = long[2 * inexact : 2 * (inexact + inexacts)].view(np.int64)
        values = long[firsts : firsts + inexacts * experts]
        if row[_BASE] == BF16:
            half_base = short[base : base + count]
            found[piece] = _with_expert(
                short, long, half_base, given, row, own, places, values, experts, work, room[wide:]
            )
        else:
            if row[_BASE] == F16:
                load(F16, short, long, base, room[:count])
            whole_base = room[:count] if row[_BASE] == F16 else long[base : base + count]
            found[piece] = _with_expert(
                short, long, whole_base, given, row, own, places, values, experts, work, room[wide:]
            )
        worst = max(worst, found[piece])
    _fence()
    return worst
