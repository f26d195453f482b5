"""Where a checkpoint's tensors are in the loaded model, and which of its modules hold experts stacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ktmerge.checkpoints import Checkpoint, align
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
    """A module of transformers with the experts of a mixture: gate above up ``[E, 2 i, h]``, and down ``[E, h, i]``.

    Attributes:
        ups: of every expert, the tensors in the checkpoint that its input goes to; one and the same if stacked there.
        downs: likewise of what goes to the down projection.
    """

    module: Any
    ups: tuple[tuple[str, ...], ...]
    downs: tuple[tuple[str, ...], ...]

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint has them stacked, too."""
        return len(self.ups) > 1 and self.ups[0] == self.ups[1]

    def inner(self, expert: int, rows: Tensor) -> Tensor:
        """What the down projection of an expert is given, ``[n, i]``, for its inputs ``rows [n, h]``."""
        both = nn.functional.linear(rows, self.module.gate_up_proj[expert])
        if hasattr(self.module, "_apply_gate"):
            given: Tensor = self.module._apply_gate(both)
            return given
        gate, up = both.chunk(2, dim=-1)
        activated: Tensor = self.module.act_fn(gate) * up
        return activated


def find_places(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Place]:
    """Where in a loaded model each tensor of its checkpoint is; single experts lie inside a stack."""
    live = as_checkpoint(model.state_dict(), checkpoint)
    fitted = fit_experts(checkpoint, live)
    found = {}
    for stored, name in align(checkpoint, fitted, "the model").mapping.items():
        info = fitted.tensors[name]
        width = live.tensors[info.file].nbytes // max(1, live.tensors[info.file].numel)
        found[stored] = Place(info.file, info.begin // max(1, width), info.shape)
    return found


def find_stacks(model: nn.Module, places: Mapping[str, Place]) -> Iterator[Stack]:
    """The modules of stacked experts whose tensors are all in the checkpoint, in either form."""
    stored: dict[tuple[str, int], str] = {(place.live, place.start): name for name, place in places.items()}
    for path, module in model.named_modules():
        up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
        if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter)) or up.dim() != 3 or down.dim() != 3:
            continue
        experts, hidden, inner = down.shape
        known = hasattr(module, "act_fn") or hasattr(module, "_apply_gate")
        if hasattr(module, "gate_up_proj_bias") or not known or up.shape != (experts, 2 * inner, hidden):
            continue
        own = {"up": f"{path}.gate_up_proj", "down": f"{path}.down_proj"}
        size = inner * hidden
        ups = [[stored.get((own["up"], start)) for start in (2 * e * size, (2 * e + 1) * size)] for e in range(experts)]
        downs = [[stored.get((own["down"], e * size))] for e in range(experts)]
        whole = stored.get((own["up"], 0)), stored.get((own["down"], 0))
        if whole[0] and whole[1] and places[whole[0]].shape == up.shape:
            yield Stack(module, ((whole[0],),) * experts, ((whole[1],),) * experts)
        elif all(None not in names for names in (*ups, *downs)):
            yield Stack(module, *(tuple(tuple(map(str, names)) for names in one) for one in (ups, downs)))
