"""Magnitudes of deltas in an interval, with their places; how many are above it. A loop, or vector instructions.

Compiled by numba; see `ktmerge.merge.kernels.compiled`. Two bf16 rows without transforms, the common case, are taken
from the raw elements to the packed result in registers where the processor packs vectors by a mask.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,call-arg"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils
from numba.extending import intrinsic
from numba.types import uint64

from ktmerge.merge.kernels.codes import BF16
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.conversion import load
from ktmerge.merge.kernels.gathering import collect
from ktmerge.merge.kernels.transforming import subtract
from ktmerge.merge.kernels.vectors import LANES, LONG, VECTOR, Vectors

_U32, _U64, _F32 = np.uint32, np.uint64, np.float32
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)


@intrinsic
def _scan_vectors(typing_context, base, expert, first, stop, low, last, name, places, patterns, found):
    """Elements ``first .. stop``, a multiple of `LANES`, of two bf16 rows: how many deltas' magnitudes are in
    ``[low, low + last]``; their indices, from ``name`` on, and patterns are packed into ``places`` and ``patterns``.
    ``found`` takes how many are above that, and the largest of all."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = dict(zip(("base", "expert", "places", "patterns", "found"),
                         (signature.args[i] for i in (0, 1, 7, 8, 9)), strict=True))  # fmt: skip
        rows = {"base": arguments[0], "expert": arguments[1], "places": arguments[7], "patterns": arguments[8],
                "found": arguments[9]}  # fmt: skip
        data = {key: context.make_array(kinds[key])(context, builder, rows[key]).data for key in rows}
        begin, end, floor, width, origin = arguments[2:7]
        vectors = Vectors(builder)
        floors, widths, tops = (vectors.repeated(word) for word in (floor, width, builder.add(floor, width)))
        above, worst = (cgutils.alloca_once_value(builder, vectors.constant(0)) for _ in range(2))
        count: Any = cgutils.alloca_once_value(builder, ir.Constant(LONG, 0))

        with cgutils.for_range_slice(builder, begin, end, ir.Constant(begin.type, LANES)) as (index, _):
            theirs, own = (vectors.bf16(data[row], index) for row in ("expert", "base"))
            size = vectors.magnitude(vectors.difference(theirs, own))
            inside = builder.icmp_unsigned("<=", builder.sub(size, floors), widths)
            beyond = builder.zext(builder.icmp_unsigned(">", size, tops), VECTOR)
            builder.store(builder.add(builder.load(above), beyond), above)
            builder.store(vectors.larger(size, builder.load(worst)), worst)
            packing, at = vectors.packing(inside), builder.load(count)
            vectors.put(packing.numbers(builder.add(index, builder.zext(origin, LONG))), data["places"], at)
            vectors.put(packing.values(size), data["patterns"], at)
            builder.store(builder.add(at, packing.count), count)
        vectors.leave(data["found"], ("add", above), ("umax", worst))
        return builder.load(count)

    return uint64(base, expert, first, stop, low, last, name, places, patterns, found), code


def _scan_packed(base, expert, first, low, last, origin, places, patterns, found, own, other, delta):
    """See `scan`."""
    n = delta.size
    whole = n // LANES * LANES
    count: Any = _scan_vectors(
        base, expert, first, first + whole, _U32(low), _U32(last), _U32(origin), places, patterns, found
    )
    above, worst = found[0], found[1]
    for i in range(first + whole, first + n):
        values = delta[:1]
        values.view(np.uint32)[0] = _U32(_U32(expert[i]) << _U32(16))
        theirs = values[0]
        values.view(np.uint32)[0] = _U32(_U32(base[i]) << _U32(16))
        values[0] = theirs - values[0]
        size = _U32(values.view(np.uint32)[0] & _MAGNITUDE)
        worst = max(worst, size)
        places[count], patterns[count] = _U32(origin + i), size
        count += _U64(1) if _U32(size - low) <= last else _U64(0)
        above += _U32(1) if size > _U32(low + last) else _U32(0)
    found[0], found[1] = above, worst
    return np.int64(count)


def _scan_in_steps(base, expert, first, low, last, origin, places, patterns, found, own, other, delta):
    """See `scan`."""
    load(BF16, base, own, first, own[: delta.size])
    load(BF16, expert, own, first, other[: delta.size])
    subtract(other[: delta.size].view(np.float32), own[: delta.size].view(np.float32), delta)
    return scan_delta(delta, low, last, _U32(origin + first), places, patterns, found)


@compiled
def _look(patterns, high, found):
    above, worst = _U32(0), _U32(0)
    for i in range(patterns.size):
        size = _U32(patterns[i] & _MAGNITUDE)
        worst = max(worst, size)
        above = _U32(above + (_U32(1) if size > high else _U32(0)))
    found[0], found[1] = above, worst


@compiled
def _name(delta, origin, places, patterns):
    for j in range(places.size):
        patterns[j] = _U32(delta[places[j]] & _MAGNITUDE)
        places[j] = _U32(places[j] + origin)


@compiled
def scan_delta(delta, low, last, origin, places, patterns, found):
    """As `scan`, of a delta whose first element is named ``origin``."""
    bits = delta.view(np.uint32)
    _look(bits, _U32(low + last), found)
    count = collect(bits, low, last, places)
    _name(bits, origin, places[:count], patterns)
    return count


scan = njit(nogil=True, error_model="numpy")(_scan_packed if LANES else _scan_in_steps)
"""``scan(base, expert, first, low, last, origin, places, patterns, found, own, other, delta)``: elements ``first ..
first + delta.size`` of two bf16 rows. How many magnitudes of their deltas are in ``[low, low + last]``; their indices,
plus ``origin``, and patterns go into ``places`` and ``patterns``, which have room for all; ``found`` takes how many are
above, and the largest pattern of all, which is not finite if an input is not. The last three are scratch."""


@compiled
def not_finite(found):
    """Whether a `scan` met a value that is not finite."""
    return found[1] >= _INFINITY
