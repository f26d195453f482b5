"""Which pieces of a checkpoint's files make each tensor of its model in memory, as transformers has it. Loads none."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.checkpoints.adapted import Block, Grid, Held
from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.live import as_checkpoint
from ktmerge.checkpoints.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor


def held_tensors(model: Checkpoint) -> dict[str, Held]:
    """The tensors of a checkpoint's model by their names in memory; none that transformers does not know."""
    from ktmerge.checkpoints.conversion import as_saved, in_memory

    with quiet_transformers():
        shell = _shell(model.config)
    if shell is None:
        return {}
    state = shell.state_dict()
    saved = as_saved(shell, in_memory(state))
    files = {
        own: name
        for name, own in align(
            model, as_checkpoint({name: one.like for name, one in saved.items()}, model), ""
        ).mapping.items()
    }
    shapes = {name: tuple(one.shape) for name, one in state.items()}
    blocks: dict[str, list[Block]] = {name: [] for name in state}
    for own, file in files.items():
        begin = 0
        for piece in saved[own].pieces:
            for grid, size in _grids(piece.view, shapes[piece.name]):
                blocks[piece.name].append(Block(file, begin, grid))
                begin += size
    return {
        name: Held(shapes[name], tuple(found))
        for name, found in blocks.items()
        if sum(_size(block, shapes[name]) for block in found) == prod(shapes[name])
    }


def _shell(config: dict[str, Any]) -> Any:
    """The model that a config describes, without memory; None if transformers has no such model."""
    try:
        import torch
        import transformers

        kind = getattr(transformers, config["architectures"][0])
        if not issubclass(kind, transformers.PreTrainedModel):
            return None
        with torch.device("meta"):
            return kind(transformers.AutoConfig.for_model(**config))
    except Exception:  # a stranger's config may break a model in any way; the names in its files are left
        return None


def _size(block: Block, shape: tuple[int, ...]) -> int:
    return prod(shape) if block.grid is None else len(block.grid.rows) * len(block.grid.columns)


def _grids(view: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[Grid | None, int]]:
    """The matrices that a view of a tensor of ``shape`` shows, in order, with their sizes; no more if it has others."""
    if view.numel() == prod(shape) and view.is_contiguous():
        yield None, view.numel()
        return
    if len(shape) == 1:
        view, shape = view.unsqueeze(-1), (*shape, 1)
    width = shape[-1]
    size = prod(shape[-2:])
    count, step = view.shape[-1], view.stride(-1)
    heads = np.array([view.storage_offset()])
    for length, stride in zip(view.shape[:-1], view.stride()[:-1], strict=True):
        heads = (heads[:, None] + np.arange(length) * stride).reshape(-1)
    turned = count > 1 and step == width > 1
    if (count > 1 and step not in (1, width)) or len(shape) > 3:
        return
    numbers, places = np.divmod(heads, size)
    across = np.arange(count)
    for own in np.split(np.arange(len(heads)), np.flatnonzero(np.diff(numbers)) + 1):
        matrix = numbers[own[0]]
        rows, columns = np.divmod(places[own], width)
        if turned and len(set(rows.tolist())) == 1 and rows[0] + count <= shape[-2]:
            yield Grid(int(matrix), rows[0] + across, columns, True), rows.size * count
        elif not turned and len(set(columns.tolist())) == 1 and columns[0] + count <= width:
            yield Grid(int(matrix), rows, columns[0] + across, False), rows.size * count
        else:
            return
