"""Elements from files to buffers, without the interpreter. Compiled by numba; see `ktmerge.merge.kernels.compiled`."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.core.types import ExternalFunction
from numba.types import int32, int64, uint64, voidptr

from ktmerge.merge.kernels.codes import F32
from ktmerge.merge.kernels.compiler import compiled, inlined

_pread = ExternalFunction("pread", int64(int32, voidptr, uint64, int64))


@compiled
def _fill(file, position, target):
    """Bytes of a file from ``position`` on; False if it ends before, or cannot be read."""
    done = int64(0)
    while done < target.size:
        count = _pread(int32(file), target[done:].ctypes, uint64(target.size - done), int64(position + done))
        if count <= 0:
            return False
        done += count
    return True


@compiled
def fetch(row, raw16, kinds, files, places, first, count):
    """Elements ``first .. first + count`` of one row, from its file to the beginning of its buffer."""
    width = 4 if kinds[row] == F32 else 2
    return _fill(files[row], places[row] + first * width, raw16[row].view(np.uint8)[: count * width])


@compiled
def fetch_all(raw16, kinds, files, places, first, count):
    """So many elements of every row, from their files; False if one cannot be read."""
    whole = True
    for row in range(kinds.size):
        whole = whole and fetch(row, raw16, kinds, files, places, first, count)
    return whole


@inlined
def rows_at(rows16, rows32, stride, number, kinds, files, places):
    """Rows ``[N + 1, stride]`` as 16-bit and as 32-bit words, their kinds, and their files and places in those."""
    return (
        carray(rows16, (number + 1, stride // 2)), carray(rows32, (number + 1, stride // 4)),
        carray(kinds, (number + 1,)), carray(files, (number + 1,)), carray(places, (number + 1,)),
    )  # fmt: skip
