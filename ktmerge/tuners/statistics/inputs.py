"""What every linear map of a model is given, told apart by hooks and sampled: one reservoir for each distinct input."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ktmerge.tuners.statistics.places import Stack
from ktmerge.tuners.statistics.reservoir import Reservoir, priorities

Kind = Literal["text", "image"]

_RECENT = 4
"""Inputs remembered to find the maps that share one: these follow each other closely."""


class Inputs:
    """Hooks on the linear maps of a model that show reservoirs what the maps are given.

    Maps that are given the very same tensor (queries, keys and values; gate and up) share a reservoir, called after the
    first of them. Text and image tokens have reservoirs of their own, ``<tensor>`` and ``<tensor>:image``, and so has
    each of stacked experts, ``<tensor>#<number>``.

    Args:
        model: the model; `close` takes the hooks off again.
        names: tensor name in the checkpoint of every weight to be measured, by its name in the model.
        stacks: the modules of stacked experts.
        seeing: those checkpoint names whose maps see nothing but image tokens.
        scratch: folder for the reservoirs' files.
        tokens: rows kept of each input.
        seed: of the sample.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        stacks: Sequence[Stack],
        seeing: set[str],
        scratch: Path,
        tokens: int,
        seed: int,
    ) -> None:
        self._seeing, self._scratch, self._tokens, self._seed = seeing, scratch, tokens, seed
        self.reservoirs: dict[str, Reservoir] = {}
        self.leaders: dict[str, str] = {}
        self._recent: deque[tuple[Tensor, int, str]] = deque(maxlen=_RECENT)
        self._example, self._images = 0, torch.zeros(0, dtype=torch.bool)
        self._passed: dict[tuple[str, Kind], int] = {}
        maps = [(module, partial(self._hook, tensor)) for tensor, module in linear_maps(model, names)]
        mixtures = [(stack.module, partial(self._hook_stack, stack)) for stack in stacks]
        self._handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in (*maps, *mixtures)
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def begin(self, example: int, images: Tensor) -> None:
        """The next pass is of this example alone; ``images``, bool ``[tokens]``: which of its tokens are images."""
        self._example, self._images = example, images
        self._passed.clear()
        self._recent.clear()

    def end(self) -> None:
        """The forward pass is over."""
        self._recent.clear()

    def samples(self) -> dict[str, list[str]]:
        """Names of the inputs of every tensor that was given anything; of stacked experts without their numbers."""
        there = {stem(name) for name in self.reservoirs}
        found = {tensor: [one for one in (own, f"{own}:image") if one in there] for tensor, own in self.leaders.items()}
        return {tensor: names for tensor, names in found.items() if names}

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from, beside the scratch files."""
        return {f"{name}|{key}": value for name, one in self.reservoirs.items() for key, value in one.state().items()}

    def restore(self, state: Mapping[str, Tensor], leaders: Mapping[str, str]) -> None:
        """Go on from a `state`, with the `leaders` of then."""
        self.leaders = dict(leaders)
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, what = key.rpartition("|")
            found.setdefault(name, {})[what] = value
        for name, one in sorted(found.items()):
            self._reservoir(name, one["square"].numel()).restore(one)

    def _hook(self, tensor: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        weight = module.get_parameter("weight")
        inputs = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
        if not (torch.is_floating_point(given) and given.shape[-1] == inputs):
            return
        leader = self._leader(tensor, given)
        if leader != tensor:
            return
        rows = given.detach().reshape(-1, given.shape[-1])
        for kind, chosen in self._kinds(tensor, len(rows)):
            start = self._passed.get((tensor, kind), 0)
            self._passed[tensor, kind] = start + len(chosen)
            self._show(tensor, kind, rows[chosen.to(rows.device)], np.arange(start, start + len(chosen)))

    def _hook_stack(self, stack: Stack, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tokens as the router sends them, each to its experts; a token has the same place in all of them."""
        given = stack.given(args, kwargs)
        for kind, chosen in self._kinds(stack.ups[0][0], len(given[0][0])):
            for expert, (rows, sent) in enumerate(given):
                places = sent[chosen].nonzero()[:, 0]
                if not len(places):
                    continue
                own = rows[chosen[places].to(rows.device)]
                ups, downs = stack.ups[expert], stack.downs[expert]
                suffix = f"#{expert}" if stack.stacked else ""
                self.leaders |= dict.fromkeys(ups, ups[0]) | dict.fromkeys(downs, downs[0])
                self._show(ups[0] + suffix, kind, own, places.numpy())
                with torch.no_grad():
                    self._show(downs[0] + suffix, kind, stack.inner(expert, own), places.numpy())

    def _show(self, tensor: str, kind: Kind, rows: Tensor, places: NDArray[np.int64]) -> None:
        if not len(rows):
            return
        chances = priorities(self._seed, kind, self._example, int(places.max()) + 1)[places]
        name = tensor if kind == "text" else f"{tensor}:image"
        self._reservoir(name, rows.shape[1]).add(rows, chances, self._example, places)

    def _leader(self, tensor: str, given: Tensor) -> str:
        """The first map that is given this very tensor, unchanged; asked once for each map."""
        if tensor not in self.leaders:
            same = (leader for one, version, leader in self._recent if one is given and version == given._version)
            self.leaders[tensor] = next(same, tensor)
            if self.leaders[tensor] == tensor:
                self._recent.append((given, given._version, tensor))
        return self.leaders[tensor]

    def _kinds(self, tensor: str, rows: int) -> Iterator[tuple[Kind, Tensor]]:
        """Which of a map's rows are of which kind, as their numbers."""
        if tensor in self._seeing:
            yield "image", torch.arange(rows)
        elif rows == len(self._images):
            yield "text", (~self._images).nonzero()[:, 0]
            yield "image", self._images.nonzero()[:, 0]
        else:
            yield "text", torch.arange(rows)

    def _reservoir(self, name: str, width: int) -> Reservoir:
        if name not in self.reservoirs:
            path = self._scratch / f"{re.sub(r'[^A-Za-z0-9.:#_-]', '_', name)}.rows"
            self.reservoirs[name] = Reservoir(path, self._tokens, width)
        return self.reservoirs[name]


def stem(reservoir: str) -> str:
    """The name of a reservoir without the number of a stacked expert."""
    return re.sub(r"#\d+", "", reservoir)


def linear_maps(model: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """Weight's name in the checkpoint and the module, for each map that is to be measured."""
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if name in names and isinstance(getattr(module, "weight", None), nn.Parameter):
            yield names[name], module
