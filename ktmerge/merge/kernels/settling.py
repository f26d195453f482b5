"""A merged delta onto its base, and what a report wants to know of it.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba.types import int64

from ktmerge.merge.kernels.bits import as_it_was, nothing
from ktmerge.merge.kernels.compiler import compiled, compiled_sums, inlined

_U32, _F32, _F64 = np.uint32, np.float32, np.float64
_ZERO = np.float32(0)
_LARGE, _SMALL = np.float32(1e30), np.float32(1e-30)


@compiled
def scale_and_add(merged, factor, base, out):
    for i in range(out.size):
        scaled = merged[i] * factor
        merged[i] = scaled
        out[i] = base[i] + scaled


@compiled
def settle_expert(merged, expert, base, out):
    none = nothing()
    for i in range(out.size):
        theirs, value = expert[i], as_it_was(out[i], none)
        out[i] = theirs if merged[i] == theirs - base[i] else value


@compiled
def settle_base(merged, base, out):
    none = nothing()
    for i in range(out.size):
        own, value = base[i], as_it_was(out[i], none)
        out[i] = own if merged[i] == _ZERO else value


@compiled_sums
def _sum_exactly(base, merged, stored, sums):
    intended, own, along = _F64(0), _F64(0), _F64(0)
    changed = int64(0)
    for i in range(base.size):
        moved = stored[i] - base[i]
        intended += _F64(merged[i]) * _F64(merged[i])
        own += _F64(base[i]) * _F64(base[i])
        along += _F64(moved) * _F64(merged[i])
        changed += 1 if moved != _ZERO else 0
    sums[0] += intended
    sums[1] += own
    sums[2] += along
    sums[3] += changed


@compiled_sums
def _sum_briefly(base, merged, stored):
    intended, own, along, changed = _F32(0), _F32(0), _F32(0), _U32(0)
    for i in range(base.size):
        moved = stored[i] - base[i]
        intended += merged[i] * merged[i]
        own += base[i] * base[i]
        along += moved * merged[i]
        changed = _U32(changed + (_U32(1) if moved != _ZERO else _U32(0)))
    return intended, own, along, changed


@inlined
def sum_up(base, merged, stored, sums):
    """Squared norms of merged delta and base, inner product of the former with what was stored, changed elements. Those
    of a block are summed in fp32 where they have a middling size, else in fp64."""
    intended, own, along, changed = _sum_briefly(base, merged, stored)
    small = intended < _SMALL and (intended != _ZERO or changed != _U32(0))
    if small or not max(intended, own) < _LARGE:
        _sum_exactly(base, merged, stored, sums)
        return
    sums[0] += _F64(intended)
    sums[1] += _F64(own)
    sums[2] += _F64(along)
    sums[3] += _F64(changed)
