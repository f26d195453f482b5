"""Some elements of a tensor, coded against the base's, and decoded again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.dtypes import BITS, FLOATS, torch_dtype
from ktmerge.deltas.coding import Array, bits, decode, encode, packed, unpacked
from ktmerge.deltas.lossy import dequantise, factorise, multiply, quantise

if TYPE_CHECKING:
    from torch import Tensor

_TRIES = 6
"""Times that the steps are halved if rounding to the element type takes too much of the allowed error."""


@dataclass(frozen=True)
class Coded:
    """A coded piece.

    Attributes:
        left_out: sum of squares of what decoding leaves out.
        change: sum of squares of the change; both 0 where nothing was asked of the error.
        decoded: the bits that decoding gives.
    """

    count: int
    coding: str
    blobs: list[bytes]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    left_out: float = 0.0
    change: float = 0.0
    decoded: Array | None = None

    @property
    def size(self) -> int:
        """Bytes of its blobs."""
        return sum(map(len, self.blobs))


def width(dtype: str) -> int:
    """Bytes of an element; packed types are taken byte by byte."""
    return BITS[dtype] // 8 if BITS[dtype] in (8, 16, 32, 64) else 1


def cast(raw: Array, dtype: str, wanted: str) -> Array:
    """Bits of elements of one type as those of another, rounded to the nearest."""
    if dtype == wanted:
        return raw
    return _bits(_values(raw, dtype).to(torch_dtype(wanted)), wanted)


def code(target: Array, reference: Array | None, dtype: str) -> Coded:
    """Elements as they are: against a reference of the same type, or against nothing. Exact."""
    if reference is None:
        return Coded(len(target), "raw", [packed(target.tobytes())])
    coding, blobs = encode(target, reference, floats=dtype in FLOATS)
    return Coded(len(target), coding, blobs)


def code_within(target: Array, reference: Array, dtype: str, error: float, shape: tuple[int, ...] | None) -> Coded:
    """Elements whose change may be off by ``error`` in norm; exact where that is no longer.

    Args:
        target: bits, of a floating-point type.
        reference: likewise.
        dtype: of both.
        error: norm of what is left out over the norm of the change.
        shape: of a whole matrix, for which factors are looked for too; None of anything else.
    """
    exact = code(target, reference, dtype)
    delta = _values(target, dtype).float() - _values(reference, dtype).float()
    change = float(delta.double().pow(2).sum())
    if not change or not math.isfinite(change):
        return exact
    candidates = [exact]
    for coded in (
        _quantised(target, reference, dtype, delta, error),
        _factors(target, reference, dtype, delta, error, shape),
    ):
        if coded is not None and coded.left_out <= error**2 * change:
            candidates.append(coded)
    best = min(candidates, key=lambda one: one.size)
    return Coded(best.count, best.coding, best.blobs, best.parameters, best.left_out, change, best.decoded)


def decoded(coding: str, parameters: Mapping[str, Any], blobs: list[bytes], count: int, reference: Array | None,
            dtype: str) -> Array:  # fmt: skip
    """The bits of a coded piece.

    Raises:
        ValueError: the blobs are not of such a piece.
    """
    if coding == "raw":
        return bits(unpacked(blobs[0], count * width(dtype)), width(dtype))
    if reference is None:
        raise ValueError("coded against a base that has no such tensor")
    if coding == "quantised":
        return _moved(reference, dtype, dequantise(dict(parameters), blobs, count))
    if coding == "low-rank":
        if math.prod(int(size) for size in parameters["shape"]) != count:
            raise ValueError("factors of another shape")
        return _moved(reference, dtype, multiply(dict(parameters), blobs).reshape(-1))
    return decode(coding, blobs, reference, floats=dtype in FLOATS)


def _quantised(target: Array, reference: Array, dtype: str, delta: Tensor, error: float) -> Coded | None:
    wanted = error
    for _ in range(_TRIES):
        parameters, blobs, approximate = quantise(delta, wanted)
        coded = _lossy(target, reference, dtype, parameters, blobs, approximate)
        if coded.left_out <= error**2 * float(delta.double().pow(2).sum()):
            return coded
        wanted /= 2
    return None


def _factors(
    target: Array, reference: Array, dtype: str, delta: Tensor, error: float, shape: tuple[int, ...] | None
) -> Coded | None:
    found = None if shape is None or len(shape) != 2 else factorise(delta.reshape(shape), error)
    return None if found is None else _lossy(target, reference, dtype, *found)


def _lossy(target: Array, reference: Array, dtype: str, parameters: dict[str, Any], blobs: list[bytes],
           approximate: Tensor) -> Coded:  # fmt: skip
    made = _moved(reference, dtype, approximate.reshape(-1))
    off = (_values(made, dtype).double() - _values(target, dtype).double()).pow(2).sum()
    rest = {key: value for key, value in parameters.items() if key != "coding"}
    return Coded(len(target), parameters["coding"], blobs, rest, left_out=float(off), decoded=made)


def _moved(reference: Array, dtype: str, change: Tensor) -> Array:
    return _bits((_values(reference, dtype).float() + change).to(torch_dtype(dtype)), dtype)


def _values(raw: Array, dtype: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(raw.tobytes()), dtype=torch_dtype(dtype))


def _bits(values: Tensor, dtype: str) -> Array:
    import torch

    return bits(values.contiguous().view(torch.uint8).numpy().tobytes(), width(dtype))


def relative(left_out: float, change: float) -> float:
    """The relative error of a tensor, from sums of squares."""
    return math.sqrt(left_out / change) if change else 0.0
