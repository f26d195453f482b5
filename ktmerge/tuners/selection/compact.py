"""Has an optimizer see only chosen elements: whatever it does, the others keep their bits.

For every tensor of which a part is chosen, the optimizer is given a vector of the chosen elements instead. Before its
step the vector's gradient is taken from the tensor's; after it, the vector is written back. Weight decay, momentum, and
any other rule can touch nothing else; and moments exist for chosen elements only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ktmerge.tuners.sharding import add_up, before, own, rows


@dataclass(frozen=True)
class Chosen:
    """Which elements of a tensor move; of a tensor that is sharded, of its own rows.

    Attributes:
        mask: bool, in the tensor's shape.
        share: of a soft mask: how much of its way from the origin each chosen element keeps at a step, ``[chosen]``.
        origin: where from, ``[chosen]``; with ``share``.
    """

    mask: Tensor
    share: Tensor | None = None
    origin: Tensor | None = None


@dataclass
class _Held:
    whole: Parameter
    part: Parameter
    places: Tensor
    chosen: Chosen
    is_all: bool

    def take(self, dense: Tensor) -> Tensor:
        """The chosen elements of a tensor in the parameter's shape; by place, which is 50 times as fast as by mask."""
        flat = dense.reshape(-1)
        return flat if self.is_all else flat.index_select(0, self.places)

    def put(self, dense: Tensor, values: Tensor) -> None:
        """Write the chosen elements of a contiguous tensor in the parameter's shape."""
        if self.is_all:
            dense.view(-1).copy_(values)
        else:
            dense.view(-1).scatter_(0, self.places, values)


class CompactUpdate:
    """Stands between an optimizer and the parameters in its groups.

    Args:
        optimizer: any whose rule works element by element, or on vectors.
        names: of the parameters, group by group, as they are in it.
        keeps_moments: what the optimizer knows of an element rests while it is not chosen, and goes on when it is
            again; otherwise every new choice has the optimizer start afresh.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]], *, keeps_moments: bool
    ) -> None:
        self._optimizer = optimizer
        self._groups = [
            list(zip(own, group["params"], strict=True))
            for own, group in zip(names, optimizer.param_groups, strict=True)
        ]
        self._keeps = keeps_moments
        self._held: dict[str, _Held] = {}
        self.resting: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._gather)
        optimizer.register_step_post_hook(self._scatter)

    def choose(self, chosen: Mapping[str, Chosen]) -> None:
        """From now on, these move; a tensor that is not named stays as it is."""
        self._rest()
        self._held = {}
        self._optimizer.state.clear()
        self._counts = self._count(chosen)
        for members, group in zip(self._groups, self._optimizer.param_groups, strict=True):
            group["params"] = [
                held.part for name, whole in members if (held := self._hold(name, whole, chosen.get(name))) is not None
            ]
        self._wake()

    def mask_gradients(self, scale: float = 1.0) -> None:
        """Set the gradient of what is not chosen to zero, so that clipping does not count it; scale the rest."""
        for members in self._groups:
            for name, whole in members:
                if whole.grad is None:
                    continue
                held = self._held.get(name)
                if held is None:
                    whole.grad.zero_()
                elif not held.is_all:
                    if not own(whole.grad).is_contiguous():
                        whole.grad = whole.grad.contiguous()
                    gradient = own(whole.grad)
                    kept = held.take(gradient)
                    held.put(gradient.zero_(), kept)
                if scale != 1.0:
                    whole.grad.mul_(scale)

    def part_of(self, parameter: Tensor) -> slice | None:
        """Where what the optimizer has in a parameter's place lies in what one process would have there; None: all."""
        held = next((one for one in self._held.values() if one.part is parameter), None)
        if held is None or held.whole is held.part:
            return None
        if held.is_all:
            return rows(held.whole)
        start = before(len(held.places))
        return slice(start, start + len(held.places))

    def _count(self, chosen: Mapping[str, Chosen]) -> dict[str, int]:
        """How many elements of each tensor are chosen, in all processes."""
        names = [name for members in self._groups for name, _ in members if name in chosen]
        counts = torch.tensor([int(chosen[name].mask.sum()) for name in names], dtype=torch.int64)
        return dict(zip(names, add_up(counts).tolist(), strict=True))

    def _hold(self, name: str, whole: Parameter, chosen: Chosen | None) -> _Held | None:
        if chosen is None or not self._counts[name]:
            return None
        local = own(whole)
        if chosen.share is None and self._counts[name] == whole.numel():
            part = whole if local.shape == whole.shape else Parameter(local)
            held = _Held(whole, part, chosen.mask.new_zeros(0, dtype=torch.int64), chosen, is_all=True)
        else:
            where = chosen.mask.reshape(-1).nonzero().squeeze(1)
            held = _Held(whole, Parameter(local.reshape(-1).index_select(0, where)), where, chosen, is_all=False)
        self._held[name] = held
        return held

    def _gather(self, *_: Any) -> None:
        for held in self._held.values():
            if held.whole.grad is None or held.part is held.whole:
                continue
            gradient = own(held.whole.grad)
            held.part.grad = gradient if held.is_all else held.take(gradient)

    def _scatter(self, *_: Any) -> None:
        with torch.no_grad():
            for held in self._held.values():
                if held.part is held.whole:
                    continue
                held.part.grad = None
                if held.is_all:
                    continue  # it shares the tensor's memory
                if held.chosen.share is not None and held.chosen.origin is not None:
                    # lerp is exact at both ends: a share of 1 keeps the step, one of 0 gives the origin
                    held.part.copy_(torch.lerp(held.chosen.origin, held.part, held.chosen.share))
                held.put(own(held.whole), held.part)

    def _rest(self) -> None:
        """Put what the optimizer knows of the chosen elements to rest, each element at its place."""
        if not self._keeps:
            return
        for name, held in self._held.items():
            for key, value in self._optimizer.state.get(held.part, {}).items():
                path = f"{key}/{name}"
                if value.shape == held.part.shape:
                    dense = self.resting.setdefault(path, torch.zeros_like(own(held.whole), dtype=value.dtype))
                    held.put(dense, value.reshape(-1))
                else:
                    self.resting[path] = value.clone()

    def _wake(self) -> None:
        for path, value in self.resting.items():
            key, _, name = path.partition("/")
            held = self._held.get(name)
            if held is None:
                continue
            dense = value.shape == own(held.whole).shape
            mine = held.take(value).reshape(held.part.shape) if dense else value.clone()
            self._optimizer.state[held.part][key] = mine
