"""A model in memory as a checkpoint: the headers its tensors would have, for matching its names with a folder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import tag_of
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
