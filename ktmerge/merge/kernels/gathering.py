"""Which elements of a block have a key in an interval: their indices, packed. A loop, or vector instructions.

Compiled by numba.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,call-arg"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic
from numba.types import uint64

from ktmerge.merge.kernels.vectors import LANES, Vectors

_U32, _U64 = np.uint32, np.uint64
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@intrinsic
def _pack(typing_context, patterns, first, low, last, found, count):
    """Indices of those of the `LANES` magnitudes from ``first`` on that are in ``[low, low + last]`` to
    ``found[count:]``, which is written for as many elements; how many they are."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, start, floor, width, target, position = arguments
        given, taken = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in ((signature.args[0], source), (signature.args[4], target))
        )
        vectors = Vectors(builder)
        offsets = builder.sub(vectors.magnitude(vectors.words(given, start)), vectors.repeated(floor))
        packing = vectors.packing(builder.icmp_unsigned("<=", offsets, vectors.repeated(width)))
        vectors.put(packing.numbers(start), taken, position)
        return packing.count

    return uint64(patterns, first, low, last, found, count), code


def _collect_packed(patterns, low, last, found):
    count = _U64(0)
    whole = patterns.size // LANES * LANES
    for first in range(0, whole, LANES):
        count += _pack(patterns, _U64(first), _U32(low), _U32(last), found, count)
    for i in range(whole, patterns.size):
        found[count] = _U32(i)
        count += _U64(1) if _U32(_U32(patterns[i] & _MAGNITUDE) - low) <= last else _U64(0)
    return np.int64(count)


def _collect_one_by_one(patterns, low, last, found):
    """Without a branch to guess wrong."""
    count = _U64(0)
    for i in range(patterns.size):
        found[count] = _U32(i)
        count += _U64(1) if _U32(_U32(patterns[i] & _MAGNITUDE) - low) <= last else _U64(0)
    return np.int64(count)


collect = njit(nogil=True, error_model="numpy")(_collect_packed if LANES else _collect_one_by_one)
"""``collect(patterns, low, last, found)``: indices of the magnitudes in ``[low, low + last]`` into ``found``, which is
uint32 and as long as ``patterns``; how many they are."""
