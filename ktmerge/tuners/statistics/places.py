"""Where a checkpoint's tensors are in the loaded model, and which of its modules hold experts stacked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.live import as_checkpoint


@dataclass(frozen=True)
class Place:
    """Elements from ``start`` on of the parameter called ``live``, as a tensor of ``shape``."""

    live: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """A module of transformers with the experts of a mixture as one parameter for each of their projections.

    Up is ``[E, u, h]``, gate and up together or up alone, and down ``[E, h, i]``; or both inputs first.

    Attributes:
        ups: of every expert, the tensors in the checkpoint that its input goes to; one and the same if stacked there.
        downs: likewise of what goes to the down projection.
        up: name of the parameter that the input goes to.
        transposed: whether inputs come first.
        sent: whether the module is given tokens and where each goes; else every expert's tokens after one another,
            those that are not its own as zeros, as in Llama 4.
    """

    module: Any
    ups: tuple[tuple[str, ...], ...]
    downs: tuple[tuple[str, ...], ...]
    up: str = "gate_up_proj"
    transposed: bool = False
    sent: bool = True

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint has them stacked, too."""
        return len(self.ups) > 1 and self.ups[0] == self.ups[1]

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """For each expert tokens ``[n, h]``, and which of them are its own, bool ``[n]``, of a call of the module."""
        hidden, *rest = (*args, *kwargs.values())
        tokens = hidden.detach().reshape(-1, hidden.shape[-1])
        if self.sent:
            routes = rest[0].reshape(-1, rest[0].shape[-1]).cpu()
            return [(tokens, (routes == expert).any(-1)) for expert in range(len(self.ups))]
        return [(own, own.any(-1).cpu()) for own in tokens.chunk(len(self.ups))]

    def inner(self, expert: int, rows: Tensor) -> Tensor:
        """What the down projection of an expert is given, ``[n, i]``, for its inputs ``rows [n, h]``."""
        weight, bias = (getattr(self.module, name, None) for name in (self.up, f"{self.up}_bias"))
        own = cast("Tensor", weight)[expert]
        raised = nn.functional.linear(rows, own.T if self.transposed else own, None if bias is None else bias[expert])
        if not self._gated:
            return cast("Tensor", self.module.act_fn(raised))
        if hasattr(self.module, "_apply_gate"):
            return cast("Tensor", self.module._apply_gate(raised))
        gate, up = raised.chunk(2, dim=-1)
        return cast("Tensor", self.module.act_fn(gate) * up)

    @property
    def _gated(self) -> bool:
        return self.up == "gate_up_proj"


def find_places(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Place]:
    """Where in a loaded model each tensor of its checkpoint is; single experts lie inside a stack."""
    live = as_checkpoint(model.state_dict(), checkpoint)
    fitted = fit_experts(checkpoint, live)
    found = {}
    for stored, name in align(checkpoint, fitted, "the model").mapping.items():
        info = fitted.tensors[name]
        if len(info.shape) == 3 and info.shape != live.tensors[info.file].shape:
            continue  # lies the other way round
        width = live.tensors[info.file].nbytes // max(1, live.tensors[info.file].numel)
        found[stored] = Place(info.file, info.begin // max(1, width), info.shape)
    return found


def find_stacks(model: nn.Module, places: Mapping[str, Place]) -> Iterator[Stack]:
    """The modules of stacked experts whose tensors are all in the checkpoint, in either form."""
    stored: dict[tuple[str, int], str] = {(place.live, place.start): name for name, place in places.items()}
    for path, module in model.named_modules():
        up = next((name for name in ("gate_up_proj", "up_proj") if _is_stack(getattr(module, name, None))), "")
        down = getattr(module, "down_proj", None)
        if not up or not _is_stack(down) or not (hasattr(module, "act_fn") or hasattr(module, "_apply_gate")):
            continue
        raised, lowered = getattr(module, up).shape, cast("Tensor", down).shape
        maps = 2 if up == "gate_up_proj" else 1
        straight = raised == (lowered[0], maps * lowered[2], lowered[1])
        transposed = raised == (lowered[0], lowered[2], maps * lowered[1])
        if straight and transposed:  # all sides equal: the module says it
            transposed = bool(getattr(module, "is_transposed", False))
        if not (straight or transposed):
            continue
        names = _stored_names(f"{path}.{up}", f"{path}.down_proj", raised, lowered, maps, stored, places)
        if names is None or (transposed and names[0][0] != names[0][-1]):
            continue
        parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
        yield Stack(module, *names, up=up, transposed=transposed, sent=len(parameters) > 2)


def _is_stack(parameter: Any) -> bool:
    return isinstance(parameter, nn.Parameter) and parameter.dim() == 3


_Names = tuple[tuple[str, ...], ...]


def _stored_names(
    up: str, down: str, raised: Sequence[int], lowered: Sequence[int], maps: int,
    stored: Mapping[tuple[str, int], str], places: Mapping[str, Place],
) -> tuple[_Names, _Names] | None:  # fmt: skip
    """Every expert's tensors in the checkpoint, up and down: stacked there as in memory, or expert by expert."""
    experts, size = lowered[0], lowered[1] * lowered[2]
    whole = stored.get((up, 0)), stored.get((down, 0))
    if whole[0] and whole[1] and places[whole[0]].shape == tuple(raised):
        return ((whole[0],),) * experts, ((whole[1],),) * experts
    ups = [[stored.get((up, (maps * e + part) * size)) for part in range(maps)] for e in range(experts)]
    downs = [[stored.get((down, e * size))] for e in range(experts)]
    if any(None in names for names in (*ups, *downs)):
        return None
    first, second = (tuple(tuple(map(str, names)) for names in one) for one in (ups, downs))
    return first, second
