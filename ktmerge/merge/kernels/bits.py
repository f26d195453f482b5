"""Numbers and their patterns, one for the other, inside a loop. Compiled by numba."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined"

from __future__ import annotations

from llvmlite import ir
from numba.extending import intrinsic
from numba.types import float32, uint32


@intrinsic
def as_float(typing, bits):
    """The fp32 of a pattern of fp32, or of bf16."""
    missing = 32 - bits.bitwidth

    def build(context, builder, signature, arguments):
        wide = builder.zext(arguments[0], ir.IntType(32)) if missing else arguments[0]
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), missing)), ir.FloatType())

    return float32(bits), build


@intrinsic
def as_bits(typing, value):
    """The pattern of an fp32."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return uint32(float32), build
