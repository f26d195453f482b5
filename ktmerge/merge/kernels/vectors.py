"""Vectors of words, for loops that the compiler does not find by itself: packing the lanes of a mask to the front.

The processor has an instruction for that (AVX-512), or a permutation that a table has for each mask (AVX2).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils


def _lanes() -> int:
    """Words of a vector that this processor packs by a mask; 0 if it does not."""
    features = llvmlite.binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 0


LANES = _lanes()
WORD, LONG = ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(WORD, LANES or 1)
_FLOATS = ir.VectorType(ir.FloatType(), LANES or 1)
_SHORTS = ir.VectorType(ir.IntType(16), LANES or 1)
_UNDEFINED = ir.Constant(VECTOR, ir.Undefined)


class Vectors:
    """Writes code over vectors.

    Args:
        builder: of the code.
    """

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def words(self, data: Any, index: Any) -> Any:
        """Those from ``index`` on."""
        found = self._builder.load(self._place(data, index, VECTOR))
        found.align = 4
        return found

    def put(self, vector: Any, data: Any, index: Any) -> None:
        """Write words from ``index`` on."""
        self._builder.store(vector, self._place(data, index, VECTOR)).align = 4

    def bf16(self, data: Any, index: Any) -> Any:
        """The patterns of fp32 of bf16 elements from ``index`` on."""
        shorts = self._builder.load(self._place(data, index, _SHORTS))
        shorts.align = 2
        return self._builder.shl(self._builder.zext(shorts, VECTOR), self.constant(16))

    def difference(self, first: Any, second: Any) -> Any:
        """Of fp32 patterns."""
        one, other = (self._builder.bitcast(bits, _FLOATS) for bits in (first, second))
        return self._builder.bitcast(self._builder.fsub(one, other), VECTOR)

    def magnitude(self, bits: Any) -> Any:
        """Patterns without signs."""
        return self._builder.and_(bits, self.constant(0x7FFFFFFF))

    def larger(self, one: Any, other: Any) -> Any:
        """The larger words, lane by lane."""
        return self._builder.select(self._builder.icmp_unsigned(">", one, other), one, other)

    def constant(self, number: int) -> Any:
        """A vector of one number."""
        return ir.Constant(VECTOR, [number] * LANES)

    def repeated(self, word: Any) -> Any:
        """A vector of one word."""
        first = self._builder.insert_element(_UNDEFINED, word, ir.Constant(WORD, 0))
        return self._builder.shuffle_vector(first, _UNDEFINED, self.constant(0))

    def reduced(self, operation: str, vector: Any) -> Any:
        """The sum of the lanes ("add"), or the largest ("umax")."""
        return self.call(f"llvm.vector.reduce.{operation}.v{LANES}i32", WORD, vector)

    def leave(self, data: Any, *found: tuple[str, Any]) -> None:
        """Write what each variable comes to by its operation, as in `reduced`, one word after the other."""
        for position, (operation, variable) in enumerate(found):
            target = self._builder.gep(data, [ir.Constant(LONG, position)])
            self._builder.store(self.reduced(operation, self._builder.load(variable)), target)

    def packing(self, mask: Any) -> Packing:
        """Of the lanes of a mask."""
        return Packing(self, self._builder, mask)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """An instruction by the name that LLVM has for it."""
        kind = ir.FunctionType(result, [one.type for one in arguments])
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)

    def _place(self, data: Any, index: Any, kind: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(data, [index]), kind.as_pointer())


class Packing:
    """Moves the lanes of a mask to the front of vectors; what is behind them means nothing.

    Args:
        vectors: writes the code.
        builder: of the code.
        mask: of `LANES` bits.
    """

    def __init__(self, vectors: Vectors, builder: Any, mask: Any) -> None:
        self._vectors, self._builder, self._mask = vectors, builder, mask
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
            return self._vectors.call("llvm.x86.avx2.permd", VECTOR, vector, self._order)
        return self._vectors.call(
            "llvm.x86.avx512.mask.compress.v16i32", VECTOR, vector, _UNDEFINED, self._mask
        )  # fmt: skip

    def numbers(self, first: Any) -> Any:
        """Their numbers, counted from ``first``, an index."""
        begin = self._vectors.repeated(self._builder.trunc(first, WORD))
        if LANES == 8:
            return self._builder.add(begin, self._order)
        return self.values(self._builder.add(begin, ir.Constant(VECTOR, list(range(LANES)))))


def _orders() -> Any:
    """For each mask of eight lanes the numbers of those that are set, in order."""
    row = ir.VectorType(ir.IntType(8), 8)
    lanes = [[lane for lane in range(8) if mask >> lane & 1] for mask in range(256)]
    found = [ir.Constant(row, own + [0] * (8 - len(own))) for own in lanes]
    return ir.Constant(ir.ArrayType(row, len(found)), found)
