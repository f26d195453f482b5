"""A model in memory as a checkpoint: the headers its tensors would have, for matching its names with a folder's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.alignment import Alignment, align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import tag_of
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


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


def live_tensors(model: Any, base: Checkpoint) -> tuple[dict[str, Tensor], Alignment]:
    """The tensors of a loaded model, taken apart or turned as ``base`` has them, and which of the base's they are.

    Their names in memory count first, then those that transformers saves the model under.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    shown, alignment = _fitted(state, base)
    if alignment.missing and alignment.extra:
        state = _under_saved_names(model, state)
        shown, alignment = _fitted(state, base)
    return {name: _part(state[info.file], info) for name, info in shown.tensors.items()}, alignment


def _fitted(state: Mapping[str, Tensor], base: Checkpoint) -> tuple[Checkpoint, Alignment]:
    whole = as_checkpoint(state, base)
    shown = fit_experts(base, whole)
    if any(info.nbytes > whole[info.file].nbytes for info in shown.tensors.values()):
        shown = whole  # a stack of what lies apart is nowhere
    return shown, align(base, shown, "the model")


def _under_saved_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state by the names in a file that transformers writes, where it renames and no more."""
    import torch

    loading = sys.modules.get("transformers.core_model_loading")
    if loading is None or not hasattr(model, "save_pretrained"):
        return dict(state)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    renamed = {id(shape): name for name, shape in loading.revert_weight_conversion(model, dict(shapes)).items()}
    return {renamed.get(id(shape), name): state[name] for name, shape in shapes.items()}


def _part(whole: Tensor, info: TensorInfo) -> Tensor:
    """What a header says of a live tensor: all of it, all of it turned, or rows of one expert; never a copy."""
    if info.shape == whole.shape:
        return whole
    if len(info.shape) == 3:
        return whole.transpose(1, 2)
    expert, row = divmod(info.begin // (whole.element_size() * whole.shape[2]), whole.shape[1])
    return whole[expert, row : row + info.shape[0]]
