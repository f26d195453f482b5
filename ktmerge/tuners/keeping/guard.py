"""Stops when the upstream loss has risen too far above the base's, and goes back to the last evaluation before that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from ktmerge.tuners.sharding import is_writer, own, rows, write_tensors

_STATE, _WEIGHTS = "guard.json", "guard.safetensors"


class Guard:
    """Watches evaluations.

    Args:
        parameters: those that are trained, as the base has them.
        allowed: by how much the upstream loss may exceed that of the first evaluation, which is the base's.
    """

    def __init__(self, parameters: Mapping[str, Parameter], allowed: float) -> None:
        self._parameters, self._allowed = parameters, allowed
        self._base: float | None = None
        self._kept: dict[str, Tensor] = {}
        self.step = 0
        self.stopped = False

    @property
    def limit(self) -> float | None:
        """The highest upstream loss that is accepted; unknown before the first evaluation."""
        return None if self._base is None else self._base + self._allowed

    def watch(self, step: int, loss: float) -> bool:
        """Look at an evaluation; whether to stop. The weights are kept if it is within the limit."""
        if self._base is None:
            self._base = loss
        if self.limit is not None and loss > self.limit:
            self.stopped = True
            return True
        self.step = step
        self._kept = {name: own(one).cpu().clone() for name, one in self._parameters.items()}
        return False

    def restore(self) -> None:
        """Set the weights back to the last evaluation within the limit."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                own(parameter).copy_(self._kept[name])

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs."""
        write_tensors(folder / _WEIGHTS, self._kept)
        if is_writer():
            (folder / _STATE).write_text(json.dumps({"base": self._base, "step": self.step}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""
        from safetensors.torch import load_file

        told = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self._base, self.step = told["base"], told["step"]
        stored = load_file(folder / _WEIGHTS)
        self._kept = {name: one[rows(self._parameters[name])].clone() for name, one in stored.items()}
