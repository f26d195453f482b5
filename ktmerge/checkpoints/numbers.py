"""Raw bytes of float tensors as numbers, without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NATIVE = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def widen(data: bytes | bytearray | memoryview, tag: str) -> NDArray[np.float64]:
    """The elements of ``data``, little-endian of the safetensors type ``tag`` (F64, F32, F16, BF16), in float64."""
    if tag == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, _NATIVE[tag]).astype(np.float64)


def narrow(values: NDArray[np.float64], tag: str) -> NDArray[np.uint8]:
    """``values`` rounded to nearest, ties to even, to the type ``tag`` (to BF16 by way of F32): their bytes."""
    with np.errstate(over="ignore"):  # the engine finds what is not finite, and names it
        if tag != "BF16":
            return np.ascontiguousarray(values, _NATIVE[tag]).reshape(-1).view(np.uint8)
        bits = values.astype(np.float32).reshape(-1).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values.reshape(-1)), 0x7FC0, rounded).astype(np.uint16).view(np.uint8)
