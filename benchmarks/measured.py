"""Statistics of random numbers, in the shapes and files that ``ktmerge stats`` makes."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.statistics import (
    FISHER,
    INPUTS,
    MEAN_ABSOLUTE,
    MEAN_SQUARE,
    SAMPLE,
    Entry,
    told_model,
    write_record,
    write_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Maps that are given what another one is given."""


def write_statistics(model: Path, folder: Path, measures: Iterable[str], tokens: int) -> Path:
    """Write statistics of the checkpoint ``model``, unless they are there; return their folder.

    Args:
        model: a checkpoint folder, of one model of a Llama's names.
        folder: to be made.
        measures: inputs, fisher.
        tokens: rows of each sample.
    """
    if (folder / "statistics.json").is_file():
        return folder
    wanted = set(measures)
    checkpoint = Checkpoint.open(model)
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    floats = [info for info in checkpoint.tensors.values() if info.is_float]
    maps = {info.name: _shared(info.name) for info in floats
            if tensor_class(info.name, info, checkpoint.config) == "matrix"}  # fmt: skip
    files = {}
    if "inputs" in wanted:
        widths = {first: checkpoint.tensors[first].shape[1] for first in maps.values()}
        entries = [
            entry for first, width in widths.items() for entry in (
                _entry(f"{SAMPLE}/{first}", (tokens, width), "F16"),
                _entry(f"{MEAN_SQUARE}/{first}", (width,), "F32"),
                _entry(f"{MEAN_ABSOLUTE}/{first}", (width,), "F32"),
            )
        ]  # fmt: skip
        files[INPUTS] = write_tensors(partial / INPUTS, entries)
    if "fisher" in wanted:
        files[FISHER] = write_tensors(partial / FISHER, [_entry(info.name, info.shape, "F32") for info in floats])
    write_record(
        partial,
        model=told_model(checkpoint),
        samples={name: [first] for name, first in maps.items()} if "inputs" in wanted else {},
        fisher={"kind": "empirical", "norm": 1.0} if "fisher" in wanted else None,
        files=files,
    )
    shutil.move(partial, folder)
    return folder


def _shared(name: str) -> str:
    for own, first in SHARED.items():
        name = name.replace(own, first)
    return name


def _entry(name: str, shape: tuple[int, ...], dtype: str) -> Entry:
    def load() -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator)
        return values.half() if dtype == "F16" else values.abs()

    return Entry(name, dtype, shape, load)
