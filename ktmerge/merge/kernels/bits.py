"""Numbers and their patterns, one for the other, inside a loop. Compiled by numba."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,call-arg"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numba.types import float32, uint32

from ktmerge.merge.kernels.compiler import compiled


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


@intrinsic
def _hidden(typing, bits):
    def build(context, builder, signature, arguments):
        code = ir.InlineAsm(ir.FunctionType(ir.IntType(32), [ir.IntType(32)]), "", "=r,0")
        return builder.call(code, arguments)

    return uint32(bits), build


@compiled
def nothing():
    """A pattern of zeros that the compiler does not know to be that, for `as_it_was`; asked for before a loop."""
    return _hidden(np.uint32(0))


@compiled
def as_it_was(value, nothing):
    """``value``, read from where a choice between it and another goes.

    Out of such a loop LLVM, from 21 on, makes masked stores, for which processors with AVX2 alone need a dozen cycles
    each (Zen 3: 42 operations); it does not where it is not certain that what stays is what was there.
    """
    return as_float(np.uint32(as_bits(value) ^ nothing))
