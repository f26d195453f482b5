"""Quantised checkpoints: by which scheme, and which stored tensors make which weight. Reads headers only.

What is known here is what the stored layout says completely: FP8 with scales, MXFP4, and bitsandbytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.derived import DerivedReader, Made, derive, shown
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.limits import is_finite
from ktmerge.errors import UsageError

Kind = Literal["scaled", "mxfp4", "bnb4", "int8"]

CONFIG_KEYS = ("quantization_config", "compression_config")
_NAMES = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
}
_BY_TENSOR = (
    (re.compile(r"\.quant_state\.bitsandbytes__"), "bitsandbytes"),
    (re.compile(r"\.SCB$"), "bitsandbytes"),
    (re.compile(r"_blocks$"), "MXFP4"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.qweight$"), "GPTQ or AWQ"),
)
_UNREADABLE = ("GPTQ", "AWQ", "GPTQ or AWQ", "an unknown scheme")
_SCALES = ("_scale_inv", "_scale")
_ASIDE = re.compile(r"(^|[._])(input_scale|activation_scale|k_scale|v_scale|weight_format|input_global_scale)$")
_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Packed:
    """A weight and the stored tensors that make it.

    Attributes:
        kind: how.
        stored: by role: ``codes``, and as the kind has it ``scales``, ``absmax``, ``map``, ``nested_absmax``,
            ``nested_map``, ``state``.
        block: rows and columns that share a scale, where the config says so.
    """

    kind: Kind
    stored: Mapping[str, TensorInfo]
    shape: tuple[int, ...]
    block: tuple[int, int] | None = None


def scheme_of(checkpoint: Checkpoint) -> str | None:
    """What a person calls the scheme of a checkpoint's quantised tensors; None if there are none."""
    packed = [name for name, kind in checkpoint.classes.items() if kind == "quant"]
    if not packed:
        return None
    method = str(_settings(checkpoint.config).get("quant_method", ""))
    if method:
        return _NAMES.get(method, method)
    found = (name for pattern, name in _BY_TENSOR if any(pattern.search(one) for one in checkpoint.tensors))
    eight = any(checkpoint[name].dtype.startswith("F8_") for name in packed)
    return next(found, "FP8" if eight else "an unknown scheme")


def way_out(scheme: str | None) -> str:
    """What to do about weights quantised by it, without the full stop."""
    readable = scheme not in _UNREADABLE
    return "Give the unquantised model" + (", or write 'dequantise: true'" if readable else "")


def dequantise(checkpoint: Checkpoint, label: str) -> Checkpoint:
    """``checkpoint`` with every quantised weight shown in F32, to be written in the type that its config names.

    One that is not quantised is given back as it is.

    Raises:
        UsageError: its scheme is not one of those whose numbers the stored layout gives completely.
    """
    scheme = scheme_of(checkpoint)
    if scheme is None:
        return checkpoint
    packed, aside = _understand(checkpoint, scheme, label)
    tensors: dict[str, TensorInfo] = {}
    names = {group.stored["codes"].name: name for name, group in packed.items()}
    for name, info in checkpoint.tensors.items():
        if name in names:
            made = TensorInfo(names[name], "F32", packed[names[name]].shape, info.file, 0, 0)
            tensors[names[name]] = shown(made)
        elif name not in aside:
            tensors[name] = info

    def opened() -> DerivedReader:
        from ktmerge.checkpoints.unpacking import unpack

        source = checkpoint.reader()
        made: dict[str, Made] = {name: unpack(group, tensors[name], source) for name, group in packed.items()}
        return DerivedReader(tensors, source, made)

    return derive(
        checkpoint,
        tensors,
        opened,
        config={key: value for key, value in checkpoint.config.items() if key not in CONFIG_KEYS},
        written={**checkpoint.written, **dict.fromkeys(packed, _own_type(checkpoint.config))},
        stale=CONFIG_KEYS,
        notes=(*checkpoint.notes, f"its {scheme} weights are dequantised ({len(packed)} tensors)."),
    )


def _understand(checkpoint: Checkpoint, scheme: str, label: str) -> tuple[dict[str, Packed], set[str]]:
    """The weights by name, and the stored tensors that are no weights of their own."""
    tensors, config = checkpoint.tensors, checkpoint.config
    block = _settings(config).get("weight_block_size")
    sides = [side for side in block if type(side) is int and side > 0] if isinstance(block, list) else []
    size = (sides[0], sides[1]) if len(sides) == 2 else None
    packed: dict[str, Packed] = {}
    for name, info in tensors.items():
        found: tuple[str, Packed] | None = None
        if info.dtype in ("F8_E4M3", "F8_E5M2"):
            scales = next((tensors[name + end] for end in _SCALES if name + end in tensors), None)
            if scales is not None:
                found = name, Packed("scaled", {"codes": info, "scales": scales}, info.shape, size)
        elif name.endswith("_blocks") and info.dtype == "U8" and len(info.shape) == 4:
            weight = name.removesuffix("_blocks")
            scales = tensors.get(f"{weight}_scales")
            shape = (info.shape[0], info.shape[2] * info.shape[3] * 2, info.shape[1])
            if scales is not None:
                found = weight, Packed("mxfp4", {"codes": info, "scales": scales}, shape)
        elif info.dtype == "I8" and len(info.shape) == 2 and f"{name.removesuffix('weight')}SCB" in tensors:
            scales = tensors[f"{name.removesuffix('weight')}SCB"]
            found = name, Packed("int8", {"codes": info, "scales": scales}, info.shape)
        elif info.dtype == "U8" and f"{name}.absmax" in tensors:
            found = _four_bits(checkpoint, name)
        if found is not None:
            packed[found[0]] = found[1]
    used = {info.name for group in packed.values() for info in group.stored.values()}
    aside = {name for name in tensors if _ASIDE.search(name)} | used
    left = [name for name, kind in checkpoint.classes.items() if name not in aside and kind == "quant"]
    if left or not packed:
        raise UsageError(
            f"{label}: its weights are quantised by {scheme}; ktmerge dequantises FP8 with scales, MXFP4 and "
            f"bitsandbytes, and this is stored otherwise ('{(left or list(tensors))[0]}'). Give the unquantised model."
        )
    for name, group in packed.items():
        _require_fit(name, group, label)
    return packed, aside


def _four_bits(checkpoint: Checkpoint, name: str) -> tuple[str, Packed] | None:
    """bitsandbytes' 4-bit codes, whose shape stands in a little JSON beside them."""
    tensors = checkpoint.tensors
    state = next((info for one, info in tensors.items() if one.startswith(name + _STATE)), None)
    roles = {"absmax": "absmax", "map": "quant_map", "nested_absmax": "nested_absmax", "nested_map": "nested_quant_map"}
    stored = {role: tensors[f"{name}.{end}"] for role, end in roles.items() if f"{name}.{end}" in tensors}
    if state is None or "map" not in stored:
        return None
    said = read_state(checkpoint, state)
    shape = said.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        return None
    if not _maxima_fit(math.prod(shape), stored, said):
        return None
    return name, Packed("bnb4", {"codes": tensors[name], "state": state, **stored}, tuple(shape))


def _maxima_fit(count: int, stored: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> bool:
    """Whether there is one maximum for each block of ``count`` elements, itself a code or a number."""
    block, outer = said.get("blocksize"), said.get("nested_blocksize")
    if type(block) is not int or block < 1 or stored["absmax"].numel != -(-count // block):
        return False
    if "nested_absmax" not in stored:
        return stored["absmax"].is_float
    return (
        stored["absmax"].dtype == "U8"
        and type(outer) is int
        and outer > 0
        and is_finite(said.get("nested_offset", 0.0))
        and stored["nested_absmax"].is_float
        and stored["nested_absmax"].numel == -(-stored["absmax"].numel // outer)
        and "nested_map" in stored
        and stored["nested_map"].is_float
        and stored["nested_map"].numel == 256
    )


def read_state(checkpoint: Checkpoint, state: TensorInfo) -> dict[str, Any]:
    """The JSON that bitsandbytes keeps as a tensor of bytes; empty if it is none."""
    with checkpoint.reader() as reader:
        raw = b"".join(bytes(block) for block in reader.blocks(state.name))
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _require_fit(name: str, group: Packed, label: str) -> None:
    codes, scales = group.stored["codes"], group.stored.get("scales")
    fits = True
    if group.kind == "scaled" and scales is not None:
        fits = scale_grid(group.shape, scales.shape, group.block) is not None and scales.dtype in (
            "F32", "F16", "BF16", "F8_E8M0", "U8",
        )  # fmt: skip
    elif group.kind == "mxfp4" and scales is not None:
        fits = scales.dtype == "U8" and scales.shape == codes.shape[:3] and codes.shape[3] == 16
    elif group.kind == "int8" and scales is not None:
        fits = scales.dtype == "F32" and scales.numel == codes.shape[0]
    elif group.kind == "bnb4":
        table = group.stored["map"]
        fits = codes.numel == (math.prod(group.shape) + 1) // 2 and table.numel == 16 and table.is_float
    if not fits:
        shapes = ", ".join(f"'{info.name}' {info.dtype} {list(info.shape)}" for info in group.stored.values())
        raise UsageError(f"{label}: the stored tensors of the quantised '{name}' do not fit together: {shapes}.")


def scale_grid(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int, int, int] | None:
    """How a grid of scales lies over a weight seen as matrices: its rows and columns, and those of a block."""
    count = math.prod(scales)
    rows, columns = shape[-2:] if len(shape) > 1 else (1, shape[0] if shape else 1)
    if count == 1:
        return 1, 1, rows, columns
    if len(scales) == 1 and len(shape) == 2 and scales[0] == rows:
        return rows, 1, 1, columns
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    down, across = scales[-2:]
    if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == (down, across):
        return down, across, *block
    if not down or not across or rows % down or columns % across:
        return None
    return down, across, rows // down, columns // across


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for section in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in CONFIG_KEYS:
            if isinstance(section.get(key), Mapping):
                return section[key]  # type: ignore[no-any-return]
    return {}


def _own_type(config: Mapping[str, Any]) -> str:
    for section in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section, Mapping) and section.get(key) in _DTYPES:
                return _DTYPES[section[key]]
    return "BF16"
