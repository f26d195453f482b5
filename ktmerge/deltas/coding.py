"""Arrays of equal length as short bytes: how far each element is from another's, in steps of its type, and back.

Floats are taken as integers in the order of their values, so that a small change is a small number. Exact for every bit
pattern, NaN among them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard

Array = np.ndarray[Any, Any]

LEVEL = 6
SPARSE_BELOW = 0.25
"""Share of changed elements below which positions and steps may be shorter than the steps of all."""

_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def packed(raw: bytes) -> bytes:
    """Bytes, compressed."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(raw)


def unpacked(blob: bytes, size: int) -> bytes:
    """What was compressed.

    Raises:
        ValueError: it is not ``size`` bytes long, or was not compressed by this.
    """
    try:
        promised = zstandard.frame_content_size(blob)
        if promised != size:  # before anything is unpacked: a few bytes can promise any number
            raise ValueError(f"{promised} bytes where {size} were written")
        return bytes(zstandard.ZstdDecompressor().decompress(blob))
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def encode(target: Array, reference: Array, *, floats: bool) -> tuple[str, list[bytes]]:
    """``target`` as steps from ``reference``: the kind of coding, and its blobs.

    Args:
        target: ``[n]``, unsigned integers that hold the bits of the elements.
        reference: the same length and type.
        floats: whether the bits are those of floating-point numbers.
    """
    steps = _steps(target, reference, floats)
    changed = np.flatnonzero(steps)
    if not len(changed):
        return "equal", []
    candidates = [("steps", [packed(planes(steps))])]
    if len(changed) < SPARSE_BELOW * len(steps):
        gaps = np.diff(changed, prepend=-1).astype(np.uint32)
        sparse = [packed(planes(gaps)), packed(planes(steps[changed]))]
        candidates.append((f"sparse:{len(changed)}", sparse))
    return min(candidates, key=lambda one: sum(map(len, one[1])))


def decode(kind: str, blobs: list[bytes], reference: Array, *, floats: bool) -> Array:
    """What `encode` was given as ``target``.

    Raises:
        ValueError: the blobs are not what `encode` gave for an array like ``reference``.
    """
    dtype, count = reference.dtype, len(reference)
    if kind == "equal":
        return reference
    if kind == "steps":
        return _moved(reference, from_planes(unpacked(blobs[0], count * dtype.itemsize), dtype), floats)
    name, _, number = kind.partition(":")
    if name != "sparse" or not number.isdigit() or len(blobs) != 2:
        raise ValueError(f"unknown coding '{kind}'")
    changed = int(number)
    positions = np.cumsum(from_planes(unpacked(blobs[0], changed * 4), np.dtype(np.uint32)).astype(np.int64)) - 1
    if changed and not 0 <= positions[0] <= positions[-1] < count:
        raise ValueError("positions outside the tensor")
    steps = np.zeros(count, dtype)
    steps[positions] = from_planes(unpacked(blobs[1], changed * dtype.itemsize), dtype)
    return _moved(reference, steps, floats)


def bits(raw: bytes | bytearray | memoryview, width: int) -> Array:
    """Bytes as unsigned integers of ``width`` bytes."""
    return np.frombuffer(raw, _INTEGERS[width])


def _steps(target: Array, reference: Array, floats: bool) -> Array:
    """Signed distances in the order of values, folded to small unsigned numbers: 0, -1, 1, -2, 2, ..."""
    with np.errstate(over="ignore"):
        distance = _ordered(target) - _ordered(reference) if floats else target - reference
    signed = distance.view(distance.dtype.str.replace("u", "i"))
    folded: Array = (distance << distance.dtype.type(1)) ^ (signed >> (8 * distance.dtype.itemsize - 1)).view(
        distance.dtype
    )
    return folded


def _moved(reference: Array, steps: Array, floats: bool) -> Array:
    one = steps.dtype.type(1)
    with np.errstate(over="ignore"):
        distance: Array = (steps >> one) ^ (steps.dtype.type(0) - (steps & one))
        moved: Array = (_ordered(reference) if floats else reference) + distance
        return _as_bits(moved) if floats else moved


def _ordered(values: Array) -> Array:
    """Bits of floats as integers in the order of the floats."""
    sign = values.dtype.type(1 << (8 * values.dtype.itemsize - 1))
    return np.where(values & sign, ~values, values | sign)


def _as_bits(ordered: Array) -> Array:
    sign = ordered.dtype.type(1 << (8 * ordered.dtype.itemsize - 1))
    return np.where(ordered & sign, ordered & ~sign, ~ordered)


def planes(values: Array) -> bytes:
    """The first bytes of all elements, then the second ones: like stands with like."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.dtype.itemsize).T.tobytes()


def from_planes(raw: bytes, dtype: np.dtype[Any]) -> Array:
    """What `planes` was given."""
    rows = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(rows.T).reshape(-1).view(dtype)
