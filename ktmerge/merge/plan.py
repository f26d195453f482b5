"""A plan: what becomes of every tensor, as data that can be shown. `planning` makes it. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ktmerge.checkpoints.alignment import Alignment
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import TensorClass
from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.checkpoints.statistics import Statistics
from ktmerge.merge.stage import Pipeline
from ktmerge.recipes.schema import Recipe

Action = Literal["base", "expert", "blend"]


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        info: the base's header entry.
        action: take the base's, take the expert's, or blend.
        dtype: safetensors tag of the output.
        key: name under which random choices are made: its own, or its embedding's for a tied head.
        sources: the name of this tensor in each expert that has it, experts sorted by name.
        expert: whose tensor is taken, for the action ``expert``.
        pipeline: the stages, for the action ``blend``.
        lambda_: scale of the merged delta, for the action ``blend``.
        rule: index of the ``where`` rule that decided, if one did.
        layout: where the linear maps are, of class matrix; of the bias of several, how they share it.
    """

    info: TensorInfo
    part: str
    tensor_class: TensorClass
    action: Action
    dtype: str
    key: str
    sources: Mapping[str, str]
    expert: str | None = None
    pipeline: Pipeline | None = None
    lambda_: float = 1.0
    rule: int | None = None
    layout: MatrixLayout | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def nbytes(self) -> int:
        """Bytes of the output; of a type that is kept, those of the input."""
        return self.info.nbytes if self.dtype == self.info.dtype else self.info.numel * BITS[self.dtype] // 8

    @property
    def is_alias(self) -> bool:
        """A head tied to its embedding, stored a second time: it must get the same values."""
        return self.key != self.name

    @property
    def method(self) -> str:
        """For people to read: the method's name, or what is kept."""
        if self.pipeline is not None:
            return self.pipeline.method
        return "keep base" if self.expert is None else f"keep {self.expert}"

    def coefficients(self) -> dict[str, Any]:
        """Everything that decides this tensor's values, as plain data."""
        return {
            "name": self.name,
            "action": self.action,
            "expert": self.expert,
            "dtype": self.dtype,
            "stages": None if self.pipeline is None else self.pipeline.spec(),
            "lambda": None if self.pipeline is None else self.lambda_,
        }


@dataclass(frozen=True)
class ExpertPlan:
    """One expert: its weight, its headers, and how its names answer to the base's."""

    name: str
    weight: float
    checkpoint: Checkpoint
    alignment: Alignment


@dataclass(frozen=True)
class Plan:
    """Everything a blend will do. Experts are sorted by name: their order in the recipe has no influence.

    ``texts`` are those of the base's files that change with the vocabulary; ``statistics``, by ``base`` or the expert's
    name, are those that a stage needs.
    """

    recipe: Recipe
    base: Checkpoint
    experts: tuple[ExpertPlan, ...]
    tensors: tuple[TensorPlan, ...]
    layers: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())
    texts: Mapping[str, str] = field(default_factory=dict)
    statistics: Mapping[str, Statistics] = field(default_factory=dict)

    def expert(self, name: str) -> ExpertPlan:
        """The expert of that name."""
        return next(expert for expert in self.experts if expert.name == name)

    @property
    def dtypes(self) -> dict[str, str]:
        """Output tags by name."""
        return {tensor.name: tensor.dtype for tensor in self.tensors}

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Columns, rows and title: what happens to which part, a row for each group of tensors treated alike."""
        columns = ["part", "class", "what", "lambda", "parameters", "tensors", "MB"]
        shown = ("part", "class", "method", "lambda", "parameters", "tensors")
        rows = [[*(str(group[key]) for key in shown), f"{group['bytes'] / 1e6:.1f}"] for group in self._groups()]
        return columns, rows, f"{self.recipe.name}: {len(self.tensors)} tensors, {len(self.experts)} experts"

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, one entry a tensor."""
        return {
            "recipe": self.recipe.name,
            "experts": {expert.name: expert.weight for expert in self.experts},
            "groups": self._groups(),
            "notes": list(self.notes),
            "tensors": [
                {"part": tensor.part, "class": tensor.tensor_class, "rule": tensor.rule, **tensor.coefficients()}
                for tensor in self.tensors
            ],
        }

    def _groups(self) -> list[dict[str, Any]]:
        """Tensors of one part (all layers of a stack together) that are treated alike."""
        groups: dict[tuple[str, ...], dict[str, Any]] = {}
        for tensor in self.tensors:
            given = tensor.pipeline.knobs() if tensor.pipeline is not None else {}
            row = {
                "part": tensor.part.partition("[")[0],
                "method": tensor.method,
                "lambda": f"{tensor.lambda_:g}" if tensor.pipeline is not None else "",
                "parameters": ", ".join(f"{key}={value}" for key, value in given.items()),
            }
            group = groups.setdefault(tuple(row.values()), {**row, "class": "", "tensors": 0, "bytes": 0})
            if tensor.tensor_class not in group["class"]:
                group["class"] = ", ".join(filter(None, (group["class"], tensor.tensor_class)))
            group["tensors"] += 1
            group["bytes"] += tensor.info.nbytes
        return list(groups.values())
