"""A bf16 expert's delta without what is small, and which of its elements have just the least magnitude that is kept.

Compiled by numba; see `ktmerge.merge.kernels.compiled`. A single loop where the processor packs vectors by a mask.
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

from ktmerge.merge.kernels.bits import as_bits, as_float
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.gathering import collect
from ktmerge.merge.kernels.vectors import LANES, LONG, VECTOR, Vectors

_U32, _U64 = np.uint32, np.uint64
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ONE = np.uint32(1)


@intrinsic
def _trim_vectors(typing_context, raw, own, stop, floor, span, theirs, delta, tied, found):
    """As `trim`, of the elements before ``stop``, a multiple of `LANES`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places = {
            name: context.make_array(signature.args[i])(context, builder, arguments[i]).data
            for i, name in ((0, "raw"), (1, "own"), (5, "theirs"), (6, "delta"), (7, "tied"), (8, "found"))
        }
        vectors = Vectors(builder)
        end, floors, spans = arguments[2], vectors.repeated(arguments[3]), vectors.repeated(arguments[4])
        kept, worst = (cgutils.alloca_once_value(builder, vectors.constant(0)) for _ in range(2))
        count: Any = cgutils.alloca_once_value(builder, ir.Constant(LONG, 0))
        with cgutils.for_range_slice(builder, ir.Constant(LONG, 0), end, ir.Constant(LONG, LANES)) as (index, _):
            pattern = vectors.bf16(places["raw"], index)
            vectors.put(pattern, places["theirs"], index)
            bits = vectors.difference(pattern, vectors.words(places["own"], index))
            size = vectors.magnitude(bits)
            builder.store(vectors.larger(size, builder.load(worst)), worst)
            inside = builder.icmp_unsigned("<", builder.sub(size, floors), spans)
            vectors.put(builder.select(inside, bits, vectors.constant(0)), places["delta"], index)
            builder.store(builder.add(builder.load(kept), builder.zext(inside, VECTOR)), kept)
            packing, at = vectors.packing(builder.icmp_unsigned("==", size, floors)), builder.load(count)
            vectors.put(packing.numbers(index), places["tied"], at)
            builder.store(builder.add(at, packing.count), count)
        vectors.leave(places["found"], ("umax", worst), ("add", kept))
        return builder.load(count)

    return uint64(raw, own, stop, floor, span, theirs, delta, tied, found), code


@compiled
def _trim_loop(raw, own, floor, span, theirs, delta):
    """The largest magnitude before the trim, and how many elements have one in the interval."""
    worst, kept = _U32(0), _U32(0)
    for i in range(delta.size):
        pattern = _U32(_U32(raw[i]) << _U32(16))
        theirs[i] = pattern
        bits: Any = as_bits(as_float(pattern) - as_float(own[i]))
        size = _U32(bits & _MAGNITUDE)
        worst = _U32(max(worst, size))
        inside = _U32(size - floor) < span
        delta[i] = bits if inside else _U32(0)
        kept = _U32(kept + (_ONE if inside else _U32(0)))
    return worst, kept


def _trim_packed(raw, own, floor, span, theirs, delta, tied, found):
    whole = delta.size // LANES * LANES
    count = np.int64(_trim_vectors(raw, own, _U64(whole), _U32(floor), _U32(span), theirs, delta, tied, found))
    if whole < delta.size:
        worst, kept = _trim_loop(raw[whole:], own[whole:], floor, span, theirs[whole:], delta[whole:])
        found[0], found[1] = max(found[0], worst), _U32(found[1] + kept)
        for i in range(whole, delta.size):
            tied[count] = _U32(i)
            count += 1 if _U32(delta[i] & _MAGNITUDE) == floor else 0
    return count


def _trim_in_steps(raw, own, floor, span, theirs, delta, tied, found):
    found[0], found[1] = _trim_loop(raw, own, floor, span, theirs, delta)
    return collect(delta, floor, _U32(0), tied)


trim = njit(nogil=True, error_model="numpy")(_trim_packed if LANES else _trim_in_steps)
"""``trim(raw, own, floor, span, theirs, delta, tied, found)``: an expert's patterns into ``theirs``, and those of its
delta from ``own`` whose magnitude is in ``[floor, floor + span)``, zeros else, into ``delta``. How many of them have
just the magnitude ``floor``, which is not 0: their indices go into ``tied``, as long as the delta. ``found`` takes the
largest magnitude of all, which is not finite if the expert is not, and how many are in the interval. All are uint32 but
``raw``, bf16."""
