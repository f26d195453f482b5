"""A loaded model with an adapter folded in: its weights become those that the folded checkpoint shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError
from ktmerge.tuners.statistics.places import find_places

if TYPE_CHECKING:
    from torch import nn


def fold_into(model: nn.Module, checkpoint: Checkpoint, folded: Checkpoint) -> None:
    """Give a model, loaded from ``checkpoint``, the tensors in which ``folded`` differs from that.

    Raises:
        UsageError: the model has one of them not at all, or in another shape.
        KtmergeError: a file cannot be read.
    """
    import torch

    places, state = find_places(model, checkpoint), model.state_dict()
    with folded.reader() as reader, torch.no_grad():
        for name, info in folded.tensors.items():
            if info == checkpoint.tensors.get(name):
                continue
            place = places.get(name)
            if place is None or place.shape != info.shape:
                raise UsageError(f"{folded.root}: changes '{name}', which the loaded model lacks; fold it by a blend.")
            target = state[place.live].view(-1)[place.start : place.start + info.numel]
            target.copy_(reader.read(name))
