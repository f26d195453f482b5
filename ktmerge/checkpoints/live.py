"""A model in memory as a checkpoint: the headers its tensors would have, for matching its names with a folder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.alignment import Alignment, align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import tag_of
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.checkpoints.conversion import Saved

Pieces = tuple["Tensor", ...]
"""Where a tensor lies in a loaded model: views whose elements, row by row, follow one another."""


def as_checkpoint(state: Mapping[str, Tensor], like: Checkpoint) -> Checkpoint:
    """The headers that a checkpoint of these tensors would have, each in a file of its name; else like ``like``."""
    infos = {
        name: TensorInfo(name, tag_of(tensor.dtype), tuple(tensor.shape), name, 0, tensor.nbytes)
        for name, tensor in state.items()
    }
    return Checkpoint(
        root=like.root,
        tensors=infos,
        config=like.config,
        weight_files=(),
        index_file=None,
        other_files=(),
        left_behind=(),
        metadata={},
        stamps={},
    )


def live_tensors(model: Any, base: Checkpoint) -> tuple[dict[str, Pieces], Alignment]:
    """The tensors of a loaded model, taken apart or turned as ``base`` has them, and which of the base's they are.

    The names that transformers saves the model under count first, as it may call others so in memory; then those.
    """
    from ktmerge.checkpoints.conversion import as_saved, in_memory

    state: dict[str, Tensor] = dict(model.state_dict())
    held = in_memory(state)
    found = [(way, *_fitted(way, base)) for way in (as_saved(model, held), held)]
    tensors, shown, alignment = min(found, key=lambda one: _troubles(one[2]))
    return {name: _pieces(tensors[info.file], info, state) for name, info in shown.tensors.items()}, alignment


def _troubles(alignment: Alignment) -> int:
    return sum(len(one) for one in (alignment.missing, alignment.extra, alignment.mismatched, alignment.ambiguous))


def _fitted(tensors: Mapping[str, Saved], base: Checkpoint) -> tuple[Checkpoint, Alignment]:
    whole = as_checkpoint({name: one.like for name, one in tensors.items()}, base)
    shown = fit_experts(base, whole)
    if any(
        info.nbytes > whole[info.file].nbytes
        or (info.shape != whole[info.file].shape and len(tensors[info.file].pieces) > 1)
        for info in shown.tensors.values()
    ):
        shown = whole  # a stack of what lies apart is nowhere, and nothing lies in a stack of it
    return shown, align(base, shown, "the model")


def _pieces(saved: Saved, info: TensorInfo, state: Mapping[str, Tensor]) -> Pieces:
    """What a header says of a live tensor: all of it, all of it turned, or rows of one expert; never a copy."""
    found = tuple(piece.of(state[piece.name]) for piece in saved.pieces)
    if info.shape == saved.like.shape:
        return found
    (whole,) = found
    if len(info.shape) == 3:
        return (whole.transpose(1, 2),)
    expert, row = divmod(info.begin // (whole.element_size() * whole.shape[2]), whole.shape[1])
    return (whole[expert, row : row + info.shape[0]],)
