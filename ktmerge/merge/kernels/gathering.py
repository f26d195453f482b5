"""Which elements of a block have a key in an interval: their indices, packed. A loop, or vector instructions.

Where the processor can pack a vector by a mask (AVX-512), the compiler has to be told: it does not find that by itself.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,call-arg"

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils
from numba.extending import intrinsic
from numba.types import uint64

_U32, _U64 = np.uint32, np.uint64
_MAGNITUDE = np.uint32(0x7FFFFFFF)
LANES = 16
WORD = ir.IntType(32)
VECTOR = ir.VectorType(WORD, LANES)
_UNDEFINED = ir.Constant(VECTOR, ir.Undefined)


@intrinsic
def _pack(typing_context, patterns, first, low, last, found, count):
    """Indices of those of the 16 magnitudes from ``first`` on that are in ``[low, low + last]`` to ``found[count:]``,
    which is written for 16 elements; how many they are."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, start, floor, width, target, position = arguments
        block = builder.load(_place(context, builder, signature.args[0], source, start))
        block.align = 4
        magnitudes = builder.and_(block, repeated(builder, ir.Constant(WORD, 0x7FFFFFFF)))
        offsets = builder.sub(magnitudes, repeated(builder, floor))
        mask = builder.icmp_unsigned("<=", offsets, repeated(builder, width))
        index = repeated(builder, builder.trunc(start, WORD))
        indices = builder.add(index, ir.Constant(VECTOR, list(range(LANES))))
        packed = builder.call(compress(builder.module), [indices, _UNDEFINED, mask])
        builder.store(packed, _place(context, builder, signature.args[4], target, position)).align = 4
        return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(LANES))), ir.IntType(64))

    return uint64(patterns, first, low, last, found, count), code


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Pointer to the 16 elements of an array from ``index`` on."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())


def compress(module: Any) -> Any:
    """The function that packs the lanes of a mask."""
    kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, ir.VectorType(ir.IntType(1), LANES)])
    return cgutils.get_or_insert_function(module, kind, "llvm.x86.avx512.mask.compress.v16i32")


def repeated(builder: Any, word: Any) -> Any:
    """A vector of one word."""
    first = builder.insert_element(_UNDEFINED, word, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, _UNDEFINED, ir.Constant(VECTOR, [0] * LANES))


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


def packs() -> bool:
    """Whether this processor packs a vector by a mask."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


collect = njit(nogil=True, error_model="numpy")(_collect_packed if packs() else _collect_one_by_one)
"""``collect(patterns, low, last, found)``: indices of the magnitudes in ``[low, low + last]`` into ``found``, which is
uint32 and as long as ``patterns``; how many they are."""
