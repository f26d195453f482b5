"""Blends of a few small tensors, through real files in, but into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from merge_models import Tensors, write
from merge_statistics import measure, needs_measurements
from torch import Tensor

from ktmerge.checkpoints.dtypes import torch_dtype
from ktmerge.checkpoints.reader import Reader
from ktmerge.merge.engine import execute
from ktmerge.merge.replanning import Planner
from ktmerge.merge.report import BlendReport
from ktmerge.recipes.load import parse_recipe

MATRIX = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"


class MemorySink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: dict[str, dict[int, Tensor]] = {}
        self.tags: dict[str, str] = {}

    def dtype(self, name: str, planned: str) -> str:
        self.tags[name] = planned
        return planned

    def write(self, name: str, values: Tensor, start: int) -> None:
        self.pieces.setdefault(name, {})[start] = values.clone()

    def write_bytes(self, name: str, data: memoryview, start: int) -> None:
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(torch_dtype(self.tags[name]))
        self.write(name, values, start // values.element_size())

    def finished(self, name: str) -> None:
        return None

    def finish(self, name: str, report: dict[str, Any]) -> None:
        pass

    def copy(self, name: str, reader: Reader, source: str) -> None:
        self.write(name, reader.read(source), 0)

    def tensors(self, like: Mapping[str, Tensor]) -> Tensors:
        found = {name: values for name, values in like.items() if not values.numel()}
        for name, pieces in self.pieces.items():
            found[name] = torch.cat([pieces[start] for start in sorted(pieces)]).view(like[name].shape)
        return found


class Workbench:
    """Runs recipes over tensors held in memory, by way of files below ``folder``: equal tensors are written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.planner = Planner()  # most blends are of models that others blended too

    def _write(self, name: str, tensors: Tensors, config: Mapping[str, Any] | None) -> Path:
        """The folder of a checkpoint of these tensors, below one that is its own."""
        digest = hashlib.sha256(json.dumps([name, config or {}]).encode())
        for key, values in tensors.items():
            digest.update(f"{key} {values.dtype} {tuple(values.shape)} ".encode())
            digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy())
        folder = self.folder / digest.hexdigest()[:24]
        return folder / name if folder.exists() else write(folder / name, tensors, config)

    def _measured(self, model: Path) -> str:
        """Statistics of a checkpoint beside it."""
        folder = model.parent / "statistics" / model.name
        if not folder.exists():
            measure(model, folder)
        return str(folder)

    def blend(
        self,
        base: Tensors,
        experts: Mapping[str, Tensors],
        blend: Mapping[str, Any],
        *,
        weights: Mapping[str, float] | None = None,
        chunk: int = 1 << 20,
        **recipe: Any,
    ) -> Tensors:
        return self.run(base, experts, blend, weights=weights, chunk=chunk, **recipe)[0]

    def run(
        self,
        base: Tensors,
        experts: Mapping[str, Tensors],
        blend: Mapping[str, Any],
        *,
        weights: Mapping[str, float] | None = None,
        chunk: int = 1 << 20,
        config: Mapping[str, Any] | None = None,
        **recipe: Any,
    ) -> tuple[Tensors, BlendReport]:
        models = {name: self._write(name, tensors, config) for name, tensors in {"base": base, **experts}.items()}
        document: dict[str, Any] = {
            "ktmerge": 1,
            "base": str(models["base"]),
            "experts": {
                name: {"model": str(models[name]), "weight": (weights or {}).get(name, 1.0)} for name in experts
            },
            "blend": dict(blend),
            **recipe,
        }
        if needs_measurements(document["blend"]):
            document["statistics"] = self._measured(models["base"])
            for name, expert in document["experts"].items():
                expert["statistics"] = self._measured(models[name])
        sink = MemorySink()
        plan = self.planner.plan(parse_recipe(document, "recipe", self.folder))
        report = execute(plan, sink, "cpu", chunk=chunk)
        return dict(sorted(sink.tensors(base).items())), report

    def merged(
        self, deltas: Mapping[str, Tensors], blend: Mapping[str, Any], *, weights: Mapping[str, float] | None = None,
        chunk: int = 1 << 20, **recipe: Any,
    ) -> Tensors:  # fmt: skip
        """The merged delta itself: over a base of zeros, the output."""
        zeros = {name: torch.zeros_like(values) for name, values in next(iter(deltas.values())).items()}
        return self.blend(zeros, deltas, {"lambda": 1.0, **blend}, weights=weights, chunk=chunk, **recipe)


def noise(seed: int, scale: float = 1e-2, **shapes: tuple[int, ...]) -> Tensors:
    """A matrix, a norm and an embedding of float32 noise."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {MATRIX: (12, 10), NORM: (9,), EMBED: (7, 5), **shapes}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in sizes.items()}
