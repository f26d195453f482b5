"""Which elements of a block have a key in an interval: their indices, packed. A loop, or vector instructions.

Where the processor can pack a vector by a mask, by an instruction of its own (AVX-512) or by a permutation that a table
has for each mask (AVX2), the compiler has to be told: it does not find that by itself.
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


def _lanes() -> int:
    """Words of a vector that this processor packs by a mask; 0 if it does not."""
    features = llvmlite.binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 0


LANES = _lanes()
WORD, LONG = ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(WORD, LANES or 1)
_UNDEFINED = ir.Constant(VECTOR, ir.Undefined)


@intrinsic
def _pack(typing_context, patterns, first, low, last, found, count):
    """Indices of those of the `LANES` magnitudes from ``first`` on that are in ``[low, low + last]`` to
    ``found[count:]``, which is written for as many elements; how many they are."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, start, floor, width, target, position = arguments
        block = builder.load(_place(context, builder, signature.args[0], source, start))
        block.align = 4
        magnitudes = builder.and_(block, repeated(builder, ir.Constant(WORD, 0x7FFFFFFF)))
        offsets = builder.sub(magnitudes, repeated(builder, floor))
        mask = builder.icmp_unsigned("<=", offsets, repeated(builder, width))
        packing = Packing(builder, mask)
        place = _place(context, builder, signature.args[4], target, position)
        builder.store(packing.numbers(builder.trunc(start, WORD)), place).align = 4
        return packing.count

    return uint64(patterns, first, low, last, found, count), code


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Pointer to the `LANES` elements of an array from ``index`` on."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())


class Packing:
    """Moves the lanes of a mask to the front of vectors; what is behind them means nothing.

    Args:
        builder: of the code.
        mask: of `LANES` bits.
    """

    def __init__(self, builder: Any, mask: Any) -> None:
        self._builder, self._mask = builder, mask
        self._bits = builder.bitcast(mask, ir.IntType(LANES))
        if LANES == 8:
            orders = cgutils.global_constant(builder.module, "ktmerge_orders", _orders())
            place = builder.gep(orders, [ir.Constant(LONG, 0), builder.zext(self._bits, LONG)])
            self._order = builder.zext(builder.load(place), VECTOR)

    @property
    def count(self) -> Any:
        """How many lanes are set."""
        return self._builder.zext(self._builder.ctpop(self._bits), LONG)

    def values(self, vector: Any) -> Any:
        """Those of a vector of words."""
        if LANES == 8:
            return self._call("llvm.x86.avx2.permd", vector, self._order)
        return self._call("llvm.x86.avx512.mask.compress.v16i32", vector, _UNDEFINED, self._mask)

    def numbers(self, first: Any) -> Any:
        """Their numbers, counted from ``first``."""
        begin = repeated(self._builder, first)
        if LANES == 8:
            return self._builder.add(begin, self._order)
        return self.values(self._builder.add(begin, ir.Constant(VECTOR, list(range(LANES)))))

    def _call(self, name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(VECTOR, [one.type for one in arguments])
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)


def _orders() -> Any:
    """For each mask of eight lanes the numbers of those that are set, in order."""
    row = ir.VectorType(ir.IntType(8), 8)
    lanes = [[lane for lane in range(8) if mask >> lane & 1] for mask in range(256)]
    found = [ir.Constant(row, own + [0] * (8 - len(own))) for own in lanes]
    return ir.Constant(ir.ArrayType(row, len(found)), found)


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


collect = njit(nogil=True, error_model="numpy")(_collect_packed if LANES else _collect_one_by_one)
"""``collect(patterns, low, last, found)``: indices of the magnitudes in ``[low, low + last]`` into ``found``, which is
uint32 and as long as ``patterns``; how many they are."""
