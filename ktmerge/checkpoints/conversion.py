"""What transformers makes of a model's tensors when it saves them: renamed, cut, turned, joined; no number is moved.

What happens is followed on tensors without memory, so that a tensor of a file is known as pieces of those in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack)
_RESHAPES = (torch.reshape, Tensor.reshape, Tensor.view)
_MOST_PIECES = 1 << 14


@dataclass(frozen=True)
class Piece:
    """A view of a tensor in memory; its elements are meant in row-major order.

    Attributes:
        name: the tensor's.
        view: the same cut of a tensor without memory, of its shape and strides.
    """

    name: str
    view: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the tensor itself."""
        place = tensor.storage_offset() + self.view.storage_offset()
        return tensor.as_strided(self.view.shape, self.view.stride(), place)


@dataclass(frozen=True)
class Saved:
    """A tensor as a file has it: its shape and type (``like``, without memory), and what it is made of, in order."""

    like: Tensor
    pieces: Sequence[Piece]


def in_memory(state: Mapping[str, Tensor]) -> dict[str, Saved]:
    """The tensors of a model by their names in memory, each of one piece."""
    likes = {
        name: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
        for name, one in state.items()
    }
    return {name: Saved(like, (Piece(name, like),)) for name, like in likes.items()}


def as_saved(model: Any, held: Mapping[str, Saved]) -> dict[str, Saved]:
    """The tensors that transformers writes into a file of the model, by their names there.

    Those of which it makes what is no sequence of pieces of them, such as a sum, are there by their names in memory.

    Args:
        model: of transformers; of another library everything is saved as it is.
        held: its tensors as `in_memory` shows them.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    if loading is None or not hasattr(model, "save_pretrained"):
        return dict(held)
    likes = {name: one.like for name, one in held.items()}
    with _Followed(likes) as followed:
        try:
            saved = loading.revert_weight_conversion(model, likes)
        except (AttributeError, RuntimeError, ValueError):  # it cannot save this model
            return dict(held)
    found = {name: Saved(like, pieces) for name, like in saved.items() if (pieces := followed.pieces(like))}
    used = {piece.name for one in found.values() for piece in one.pieces}
    return {**{name: one for name, one in held.items() if name not in used}, **found}


class _Followed(TorchFunctionMode):
    """Has copies be the tensors themselves, and keeps of what joined ones are made."""

    def __init__(self, likes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {_storage(like): name for name, like in likes.items()}
        self._made: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        if func is Tensor.view and not isinstance(args[1], torch.dtype):
            func = Tensor.reshape  # what would have been copied before may lie scattered
        found = func(*args, **(kwargs or {}))
        if func in _JOINS:
            self._join(found, func is torch.stack, *args, **(kwargs or {}))
        elif func in _RESHAPES and _storage(found) != _storage(args[0]):
            self._made[_storage(found)] = found, [args[0]]
        return found

    def _join(self, found: Tensor, stacked: bool, tensors: Sequence[Tensor], dim: int = 0) -> None:
        parts = [one.unsqueeze(dim) for one in tensors] if stacked else tensors
        ahead = found.shape[: dim % found.dim()]
        if prod(ahead) * len(parts) <= _MOST_PIECES and len({one.dtype for one in parts}) == 1:
            places = product(*map(range, ahead))
            self._made[_storage(found)] = found, [one[place] for place in places for one in parts]

    def pieces(self, like: Tensor) -> list[Piece]:
        """What a tensor is made of; nothing, if it cannot be told."""
        name = self._names.get(_storage(like))
        if name is not None:
            return [Piece(name, like)]
        made, parts = self._made.get(_storage(like), (None, []))
        if made is None or made.numel() != like.numel() or not like.is_contiguous():
            return []
        found = [self.pieces(part) for part in parts]
        return [piece for one in found for piece in one] if all(found) else []


def _storage(tensor: Tensor) -> int:
    """What tells tensors that share their elements."""
    return int(tensor.untyped_storage()._cdata)
