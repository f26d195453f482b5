"""Masks in a safetensors file: one bit an element, in the tensor's order, the first in the lowest bit.

``selected/<tensor>`` moves at the end of the run, ``touched/<tensor>`` moved at any time; their shapes are in the
metadata, as JSON under ``ktmerge``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktmerge.errors import UsageError

MASKS = "ktmerge-selection.safetensors"
COUNTS = "ktmerge-selection.json"
DRAWING = "ktmerge-selection.svg"
"""What a fine-tune with ``select`` leaves beside the weights."""


@dataclass(frozen=True)
class Stored:
    """What a file holds: bool masks in the tensors' shapes, and whatever else was put beside them."""

    masks: dict[str, Tensor]
    touched: dict[str, Tensor]
    others: dict[str, Tensor]
    facts: dict[str, Any]


def pack(mask: Tensor) -> Tensor:
    """uint8 ``[ceil(n / 8)]`` of a bool mask."""
    flat = mask.reshape(-1).cpu()
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask that was packed."""
    size = int(torch.Size(shape).numel())
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[:size].bool().view(shape)


def write(
    path: Path,
    masks: Mapping[str, Tensor],
    touched: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write masks, what was ever chosen, further tensors under their own names, and facts as JSON data."""
    from safetensors.torch import save_file

    tensors = {f"selected/{name}": pack(mask) for name, mask in masks.items()}
    tensors |= {f"touched/{name}": pack(mask) for name, mask in touched.items()}
    tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in others.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    # in one entry: safetensors writes several in no order
    save_file(tensors, path, {"ktmerge": json.dumps({"shapes": shapes, "facts": facts})})


def read(path: Path) -> Stored:
    """Read such a file.

    Raises:
        UsageError: there is none.
    """
    from safetensors import safe_open

    if not path.exists():
        raise UsageError(f"{path}: holds no masks; a fine-tune with 'select' writes them.")
    groups: dict[str, dict[str, Tensor]] = {"selected": {}, "touched": {}, "": {}}
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["ktmerge"])
        shapes = told["shapes"]
        for key in file.keys():  # noqa: SIM118 - no mapping
            kind, _, name = key.partition("/")
            if kind in ("selected", "touched"):
                groups[kind][name] = unpack(file.get_tensor(key), tuple(shapes[name]))
            else:
                groups[""][key] = file.get_tensor(key)
    order = list(shapes)
    return Stored(
        {name: groups["selected"][name] for name in order},
        {name: groups["touched"][name] for name in order},
        groups[""],
        told["facts"],
    )
