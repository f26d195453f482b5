"""What was measured of one tensor, read from folders of statistics when a stage asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.checkpoints.reader import TensorReader
from ktmerge.checkpoints.statistics import SAMPLE, Statistics
from ktmerge.errors import KtmergeError
from ktmerge.merge.needs import BASE, name_in
from ktmerge.merge.plan import TensorPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class OpenStatistics:
    """The statistics of one model and their files; may be read from any thread."""

    statistics: Statistics
    reader: TensorReader


@dataclass(frozen=True)
class TensorMeasurements:
    """The `Measurements` of one piece of one tensor.

    Attributes:
        models: by ``base`` or the expert's name.
        start: index of the piece's first element in the flattened tensor.
        shape: of the piece.
        device: where the numbers go.
    """

    models: Mapping[str, OpenStatistics]
    tensor: TensorPlan
    start: int
    shape: tuple[int, ...]
    device: torch.device

    def inputs(self, expert: str = "") -> Tensor:
        import torch

        model, name = self._model(expert)
        found = []
        for sample in model.statistics.samples.get(name, ()):
            key = f"{SAMPLE}/{sample}"
            found.append(model.reader.read(key).view(model.statistics.tensors[key].shape).float())
        if not found:
            raise self._not_measured(expert, "inputs")
        return (found[0] if len(found) == 1 else torch.cat(found, dim=-2)).to(self.device)

    def fisher(self, expert: str = "") -> Tensor:
        model, name = self._model(expert)
        if model.statistics.fisher_of(name) is None:
            raise self._not_measured(expert, "Fisher information")
        values = model.reader.read(f"fisher/{name}", self.start, self.start + math.prod(self.shape))
        return values.float().view(self.shape).to(self.device)

    def fisher_norm(self, expert: str = "") -> float:
        model, _ = self._model(expert)
        if not model.statistics.has_fisher:
            raise self._not_measured(expert, "Fisher information")
        return model.statistics.fisher_norm

    def scales(self, expert: str = "") -> Tensor | None:
        model, name = self._model(expert)
        info = model.statistics.scales_of(name)
        return None if info is None else model.reader.read(info.name).float().view(info.shape).to(self.device)

    def _model(self, expert: str) -> tuple[OpenStatistics, str]:
        owner = expert or BASE
        if owner not in self.models:
            raise self._not_measured(expert, "anything")
        model = self.models[owner]
        return model, name_in(model.statistics, self.tensor, owner)

    def _not_measured(self, expert: str, what: str) -> KtmergeError:
        owner = f"expert '{expert}'" if expert else "the base"
        return KtmergeError(f"tensor '{self.tensor.name}': {what} of it was not measured in {owner}.")


def stored_fisher(
    models: Mapping[str, OpenStatistics], tensor: TensorPlan, owner: str
) -> tuple[TensorReader, str, float] | None:
    """Where a tensor's Fisher information in the base or an expert is, and its norm; None if there is none in fp32."""
    if owner not in models or not models[owner].statistics.has_fisher:
        return None
    model = models[owner]
    name = name_in(model.statistics, tensor, owner)
    info = model.statistics.fisher_of(name)
    if info is None or info.dtype != "F32" or info.numel != tensor.info.numel:
        return None
    return model.reader, f"fisher/{name}", model.statistics.fisher_norm
