"""Averages of the weights along a run: exponential (EMA), or the mean of the latest of regular snapshots (LAWA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ktmerge.tuners.sharding import own, rows, write_tensors

_STATE = "average.safetensors"


class Average(Protocol):
    """A mean of the parameters of all steps so far, however weighted."""

    def after_step(self, step: int) -> None:
        """Take the weights as they are after a step."""

    def value(self, name: str) -> Tensor:
        """The average, fp32; of a sharded parameter, of the process's own rows."""

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs."""

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""


class Exponential:
    """``a <- d a + (1 - d) w`` after every step, from the base on.

    The decay rises as ``min(decay, (1 + t) / (10 + t))``, so that short runs are not averaged into the base.

    Args:
        parameters: as the base has them, by name.
        decay: d.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._averages = {name: own(one).clone() for name, one in parameters.items()}

    def after_step(self, step: int) -> None:
        share = 1.0 - min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._averages[name].lerp_(own(parameter), share)

    def value(self, name: str) -> Tensor:
        return self._averages[name]

    def save(self, folder: Path) -> None:
        write_tensors(folder / _STATE, self._averages)

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        for name, stored in load_file(folder / _STATE).items():
            self._averages[name].copy_(stored[rows(self._parameters[name])])


class Latest:
    """The mean of the last ``window`` snapshots, one every ``every`` steps (LAWA, arXiv 2209.14981).

    Before there is one, the weights themselves.

    Args:
        parameters: by name.
        window: how many snapshots; each takes four bytes a parameter of the host's memory.
        every: steps between them.
    """

    def __init__(self, parameters: Mapping[str, Parameter], window: int, every: int) -> None:
        self._parameters, self._window, self._every = parameters, window, every
        self._snapshots: list[dict[str, Tensor]] = []

    def after_step(self, step: int) -> None:
        if step % self._every:
            return
        taken = {name: own(one).cpu().clone() for name, one in self._parameters.items()}
        self._snapshots = [*self._snapshots, taken][-self._window :]

    def value(self, name: str) -> Tensor:
        if not self._snapshots:
            return own(self._parameters[name])
        # the sum of equal fp32 numbers is exact in fp64: what never moved keeps its bits
        total = torch.zeros(own(self._parameters[name]).shape, dtype=torch.float64)
        for snapshot in self._snapshots:
            total += snapshot[name]
        return (total / len(self._snapshots)).float()

    def save(self, folder: Path) -> None:
        named = {f"{n}/{name}": one for n, taken in enumerate(self._snapshots) for name, one in taken.items()}
        write_tensors(folder / _STATE, named)

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        found: dict[int, dict[str, Tensor]] = {}
        for path, stored in load_file(folder / _STATE).items():
            number, _, name = path.partition("/")
            found.setdefault(int(number), {})[name] = stored[rows(self._parameters[name])].clone()
        self._snapshots = [found[number] for number in sorted(found)]


@contextmanager
def averaged(parameters: Mapping[str, Parameter], average: Average) -> Iterator[None]:
    """The model has the averaged weights in here, and its own again afterwards."""
    before = {name: own(one).cpu().clone() for name, one in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            own(parameter).copy_(average.value(name))
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                own(parameter).copy_(before[name])
