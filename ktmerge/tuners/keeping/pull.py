"""L2-SP and EWC: a spring from every weight to where it was, as stiff as the Fisher information says if it is given.

The penalty is ``alpha / 2 * sum_i F_i (w_i - w0_i)^2``: L2-SP (arXiv 1802.01483, eq. 2) with F = 1, EWC (arXiv
1612.00796, eq. 3) with F the diagonal of the Fisher information, divided by its mean over all trained elements, so that
``alpha`` means the same with and without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.live import as_checkpoint
from ktmerge.checkpoints.statistics import Statistics
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.tuners.origins import Origins
from ktmerge.tuners.sharding import add_up, like, own, rows


class Pull:
    """Adds the penalty's gradient to that of the loss.

    Args:
        parameters: as the base has them, by name.
        strength: alpha.
        fisher: F by name, in the parameters' shapes, of sharded ones the process's own rows; None: 1.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], strength: float, fisher: Mapping[str, Tensor] | None
    ) -> None:
        self._parameters = parameters
        self._strength = strength
        self._origins = Origins(parameters)
        self._fisher = None if fisher is None else _relative(fisher)
        self.penalty = 0.0

    def add_gradients(self) -> None:
        """Before a step: ``g += alpha F (w - w0)``; `penalty` is what that is the gradient of."""
        total = 0.0
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                mine = own(parameter)
                away = mine - self._origins[name]
                force = away if self._fisher is None else away * self._fisher[name]
                total += float((away * force).sum(dtype=torch.float64))
                if parameter.grad is None:
                    if not int(add_up(torch.tensor(int(force.any())))):
                        continue  # what the loss does not reach stays without a gradient, and without weight decay
                    parameter.grad = like(parameter, torch.zeros_like(mine))
                own(parameter.grad).add_(force, alpha=self._strength)
        self.penalty = self._strength / 2 * _sum(total)


def open_fisher(folder: Path, base: Checkpoint) -> Statistics:
    """The statistics that the stiffness is taken from, checked by their headers.

    Raises:
        UsageError: there are none, without Fisher information, or they are of another model.
    """
    found = Statistics.open(folder)
    if not found.has_fisher:
        raise UsageError(f"{folder}: has no Fisher information; make it with 'ktmerge stats --fisher empirical'.")
    if not found.is_of(base):
        raise UsageError(f"{folder}: was measured in another model; measure it in the base, {base.root}.")
    return found


def read_fisher(found: Statistics, base: Checkpoint, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """F of every trained parameter, fp32, by the parameter's name.

    Raises:
        UsageError: it lacks a tensor that is trained.
    """
    state: Any = {name: parameter.detach() for name, parameter in parameters.items()}
    names = {live: name for name, live in align(base, as_checkpoint(state, base), "the model").mapping.items()}
    fisher = {}
    with found.reader() as reader:
        for name, parameter in parameters.items():
            stored = names.get(name, name)
            info = found.fisher_of(stored)
            if info is None or info.shape != tuple(parameter.shape):
                raise UsageError(f"{found.root}: has no Fisher information of '{name}', which is trained.")
            values = reader.read(f"fisher/{stored}").view(parameter.shape)[rows(parameter)]
            fisher[name] = values.to(own(parameter))
    return fisher


def _relative(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    count = _sum(sum(tensor.numel() for tensor in fisher.values()))
    mean = _sum(sum(float(tensor.sum(dtype=torch.float64)) for tensor in fisher.values())) / max(1, count)
    if not mean > 0:
        raise KtmergeError("the Fisher information of what is trained is zero everywhere; measure it on other data.")
    return {name: tensor / mean for name, tensor in fisher.items()}


def _sum(number: float) -> float:
    """Over all processes."""
    return float(add_up(torch.tensor(number, dtype=torch.float64)))
