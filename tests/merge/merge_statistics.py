"""Statistics of random numbers, as if measured in a checkpoint: the same for the same folder name and tensor."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.matrices import matrix_layout
from ktmerge.checkpoints.statistics import (
    FISHER,
    INPUTS,
    MEAN_SQUARE,
    SAMPLE,
    Entry,
    told_model,
    write_record,
    write_tensors,
)
from ktmerge.errors import UsageError
from ktmerge.merge.needs import needs_of
from ktmerge.merge.rules import resolve_rules
from ktmerge.merge.settings import blend_setting
from ktmerge.recipes.schema import Blend, Recipe

TOKENS = 40
NORM = 3.0


def needs_measurements(blend: Mapping[str, Any]) -> bool:
    """Whether a recipe with this blend section would be refused without statistics."""
    try:
        recipe = Recipe(ktmerge=1, blend=Blend.model_validate(blend))
        setting = blend_setting(recipe.blend)  # type: ignore[arg-type]
        settings = [setting, *(rule.setting for rule in resolve_rules(recipe, setting, None) if rule.setting)]
    except (UsageError, ValueError):
        return False
    return any(needs_of(pipeline) for one in settings for pipeline in one.pipelines.values())


def measure(model: Path, folder: Path, **only: Any) -> str:
    """Write statistics of the checkpoint ``model``; return the folder relative to the recipe, two levels up.

    Args:
        model: a checkpoint folder.
        folder: to be made.
        only: ``fisher=False``, ``inputs=False`` or ``scales=False`` leave one out.
    """
    checkpoint = Checkpoint.open(model)
    folder.mkdir(parents=True)
    floats = [info for info in checkpoint.tensors.values() if info.is_float and info.numel]
    maps = [info for info in floats if tensor_class(info.name, info, checkpoint.config) == "matrix"]
    inputs = [_inputs(checkpoint, info, folder.name) for info in maps] if only.get("inputs", True) else []
    norms = [info for info in floats if "norm" in info.name and only.get("scales", True)]
    inputs += [
        Entry(f"{MEAN_SQUARE}/{info.name}", "F32", info.shape, partial(random, _square(folder, info), info.shape))
        for info in norms
    ]
    fisher = [
        Entry(info.name, "F32", info.shape, partial(random, f"fisher {folder.name} {info.name}", info.shape))
        for info in floats
        if only.get("fisher", True)
    ]
    files = {INPUTS: write_tensors(folder / INPUTS, inputs)} if inputs else {}
    files |= {FISHER: write_tensors(folder / FISHER, fisher)} if fisher else {}
    write_record(
        folder,
        model=told_model(checkpoint),
        samples={info.name: [info.name] for info in maps} if only.get("inputs", True) else {},
        fisher={"kind": "empirical", "norm": NORM} if fisher else None,
        files=files,
        scales=dict.fromkeys((info.name for info in norms), TOKENS) if only.get("scales", True) else None,
    )
    return folder.relative_to(folder.parent.parent).as_posix()


def _square(folder: Path, info: TensorInfo) -> str:
    return f"fisher scales {folder.name} {info.name}"


def random(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Above 0 where ``key`` begins with fisher, else normal; the same for the same key."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    draw = torch.rand if key.startswith("fisher") else torch.randn
    return draw(shape, generator=generator)


def _inputs(checkpoint: Checkpoint, info: TensorInfo, owner: str) -> Entry:
    layout = matrix_layout(info.name, info.shape, checkpoint.config)
    assert layout is not None
    shape = (*info.shape[:-2], TOKENS, info.shape[-2] if layout.transposed else info.shape[-1])
    return Entry(f"{SAMPLE}/{info.name}", "F32", shape, partial(random, f"inputs {owner} {info.name}", shape))
