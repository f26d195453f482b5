"""The element types of safetensors: how wide each is, which are numbers to blend, and their names in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktmerge.errors import KtmergeError

if TYPE_CHECKING:
    import torch

# Widths in bits: the packed four- and six-bit floats have no whole number of bytes an element.
BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose values are the weights themselves."""

PACKED_FLOATS = frozenset(tag for tag in BITS if tag.startswith(("F8_", "F6_")) or tag == "F4")
"""Types whose values mean something only together with scales kept elsewhere."""

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_TAGS = {name: tag for tag, name in _TORCH_NAMES.items()}


def torch_dtype(tag: str) -> torch.dtype:
    """The torch type of a safetensors tag.

    Raises:
        KtmergeError: torch has no element type for it (the four- and six-bit floats).
    """
    import torch

    dtype = getattr(torch, _TORCH_NAMES.get(tag, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise KtmergeError(f"torch has no element type for the safetensors type {tag}.")
    return dtype


def tag_of(dtype: torch.dtype) -> str:
    """The safetensors tag of a torch type.

    Raises:
        KtmergeError: safetensors cannot store it.
    """
    tag = _TAGS.get(str(dtype).removeprefix("torch."))
    if tag is None:
        raise KtmergeError(f"safetensors cannot store tensors of type {dtype}.")
    return tag
