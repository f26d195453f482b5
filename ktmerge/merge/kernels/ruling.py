"""Deltas of all experts to one merged delta, or to a number for each element that decides about it: rules that are
more than a sum, a maximum or an election.

Compiled by numba; see `ktmerge.merge.kernels.compiled`. The torch functions of the stages are the reference.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator,call-arg"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.extending import intrinsic
from numba.types import float64, int64

from ktmerge.merge.kernels.codes import CONSENSUS, FINE, INFORMED, OVERLAP, SENSITIVITY, STITCH, TRUST
from ktmerge.merge.kernels.compiler import compiled

_U32, _F32, _F64 = np.uint32, np.float32, np.float64
_EXPONENT = np.uint32(0x7F800000)
_ZERO = np.float32(0)


@intrinsic
def _root(typing_context, value):
    """The instruction, where `math.sqrt` would call a library."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [arguments[0].type]), arguments)

    return float64(float64), code


@compiled
def _total(deltas, weights, out):
    """``sum_t w_t tau_t``, every product and sum rounded by itself."""
    for i in range(out.size):
        out[i] = deltas[0][i] * _F32(weights[0])
    for t in range(1, weights.size):
        weight = _F32(weights[t])
        own = deltas[t]
        for i in range(out.size):
            out[i] += own[i] * weight


@compiled
def _consensus(deltas, weights, selectivity, agree, out):
    _total(deltas, weights, out)
    for i in range(out.size):
        exact = _F64(0)
        for t in range(weights.size):
            own = _F64(deltas[t][i]) * weights[t]
            exact = own if t == 0 else exact + own
        votes = 0
        for t in range(weights.size):
            own = _F64(deltas[t][i]) * weights[t]
            votes += 1 if abs(own) > selectivity * abs(exact - own) else 0
        out[i] = out[i] if votes >= agree else _ZERO


@compiled
def _overlap(base, deltas, weights, factors, step, out):
    for i in range(out.size):
        floor = _F32(step) * base[i]
        number = 0
        for t in range(weights.size):
            own = deltas[t][i]
            number += 1 if (abs(own) >= floor) & (own != _ZERO) else 0
        total = _ZERO
        for t in range(weights.size):
            delta = deltas[t][i]
            own = delta * _F32(weights[t])
            own = own * _F32(factors[t]) if number == 1 else own
            total += own if (abs(delta) >= floor) & (delta != _ZERO) else _ZERO
        out[i] = total / _F32(number) if number > 1 else total


@compiled
def _power_of_two(base, out):
    bits, powers = base.view(np.uint32), out.view(np.uint32)
    for i in range(out.size):
        powers[i] = bits[i] & _EXPONENT


@compiled
def _stitch(deltas, weights, out):
    _total(deltas, weights, out)
    for i in range(out.size):
        share = _ZERO
        for t in range(weights.size):
            own = _F32(weights[t]) if deltas[t][i] != _ZERO else _ZERO
            share = own if t == 0 else share + own
        out[i] = out[i] / share if share > _ZERO else _ZERO


@compiled
def _sensitivity(deltas, weights, out):
    for i in range(out.size):
        total, before = _F64(0), _F64(0)
        for t in range(weights.size):
            own = abs(_F64(deltas[t][i]) * weights[t])
            total += _F64(2) * own * before
            before += own
        out[i] = _F32(_root(total))


@compiled
def _trust(deltas, weights, limit, work, out):
    _sensitivity(deltas, weights, work)
    _total(deltas, weights, out)
    for i in range(out.size):
        out[i] = _ZERO if work[i] > _F32(limit) else out[i]


@compiled
def _informed(deltas, weights, known, sizes, floor, base_weight, is_scaled, out):
    """Mean by weights and information; the base's comes first and wants no change."""
    whole = _F64(0)
    for t in range(weights.size):
        whole = weights[t] if t == 0 else whole + weights[t]
    plain_share = whole + base_weight
    for i in range(out.size):
        wanted, total, plain = _F64(0), _F64(0), _F64(0)
        for t in range(weights.size):
            own = _F64(known[t + 1][i])
            size = sizes[t + 1]
            own = (own / size if size > _F64(0) else own) + floor if is_scaled else own + floor * size
            own = own * weights[t]
            wanted += own * _F64(deltas[t][i])
            total += own
            plain += weights[t] * _F64(deltas[t][i])
        if base_weight != _F64(0):
            own, size = _F64(known[0][i]), sizes[0]
            own = (own / size if size > _F64(0) else own) + floor if is_scaled else own + floor * size
            total += own * base_weight
        out[i] = _F32(wanted / total if total > _F64(0) else plain / plain_share)


def rule(code, parts, number, count, numbers, extra_rows, extra, scratch, out):
    """Something of ``count`` elements, by ``code``, into ``out`` fp32 ``[count]``; FINE.

    Args:
        code: of what; see `ktmerge.merge.program`.
        parts: fp32 ``[N + 1, count]``: base and deltas.
        number: N.
        count: elements.
        numbers: fp64 ``[5 + 3 N]``: four that the rule has, weights, factors, and sizes of the base's and each expert's
            information.
        extra_rows: how many rows ``extra`` has.
        extra: fp32 ``[extra_rows, count]``: what else the rule wants to know of each element.
        scratch: fp32 ``[count]``.
        out: where the result goes.
    """
    values, told = carray(parts, (number + 1, count)), carray(numbers, (5 + 3 * number,))
    also, work, merged = carray(extra, (extra_rows, count)), carray(scratch, (count,)), carray(out, (count,))
    first, second, third = told[0], told[1], told[2]
    weights, factors, sizes = told[4 : 4 + number], told[4 + number : 4 + 2 * number], told[4 + 2 * number :]
    base, deltas = values[0], values[1:]
    if code == CONSENSUS:
        _consensus(deltas, weights, first, second, merged)
    elif code == OVERLAP:
        _power_of_two(base, work)
        _overlap(work, deltas, weights, factors, first, merged)
    elif code == STITCH:
        _stitch(deltas, weights, merged)
    elif code == SENSITIVITY:
        _sensitivity(deltas, weights, merged)
    elif code == TRUST:
        _trust(deltas, weights, first, work, merged)
    elif code == INFORMED:
        _informed(deltas, weights, also, sizes, first, second, third != _F64(0), merged)
    return int64(FINE)
