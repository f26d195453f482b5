"""Where an adapter goes: the linear maps, layers and connector that a part expression means in a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError, did_you_mean
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.training import TrainExpression
from ktmerge.tuners.adapters.size import SCALED, SCALED_INSIDE


class Places:
    """The places of one model, by the names of its modules.

    Raises:
        UsageError: the job's expression matches nothing.
    """

    def __init__(self, model: Any, base: Checkpoint, job: FinetuneJob) -> None:
        self._model = model
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.parts = Parts(names, base.config)
        self._names = names
        self._wanted: Callable[[str], bool] = TrainExpression.parse(job.adapted_part).matcher(self.parts)
        self._part = job.adapted_part

    def linear(self, modules: list[str]) -> list[str]:
        """Linear maps, but for the output head, which may be one tensor with the embedding.

        Args:
            modules: only those of these names; empty: all.

        Raises:
            UsageError: there are none, or none of such a name.
        """
        head = self._model.get_output_embeddings()
        found = [
            name
            for name, module in self._model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head and self._wanted(f"{name}.weight")
        ]
        leaves = {name.rpartition(".")[2] for name in found}
        if not found:
            raise UsageError(f"train '{self._part}': has no linear maps for an adapter beside embedding and head.")
        for wanted in modules:
            if not any(_ends(name, wanted) for name in found):
                raise UsageError(f"adapter.modules: '{self._part}' has no '{wanted}'.{did_you_mean(wanted, leaves)}")
        return [name for name in found if not modules or any(_ends(name, wanted) for wanted in modules)]

    def scaled(self, modules: list[str]) -> tuple[list[str], list[str]]:
        """The linear maps that IA3 scales, and those of them whose inputs it scales.

        Raises:
            UsageError: none has a usual name, and none is given.
        """
        names = self.linear(modules)
        if not modules:
            names = [name for name in names if name.rpartition(".")[2] in (*SCALED, *SCALED_INSIDE)]
        if not names:
            raise UsageError("ia3: no keys, values or feed-forward maps of a usual name; name them as adapter.modules.")
        return names, [name for name in names if name.rpartition(".")[2] in SCALED_INSIDE]

    def layers(self) -> list[str]:
        """The layers of the language model.

        Raises:
            UsageError: there are none, or the expression names other layers.
        """
        found: dict[str, None] = {}
        for name in self._names:
            tower, layered, number = self.parts.of(name).partition(".layers[")
            if not layered or not self._wanted(name):
                continue
            if tower != "llm":
                raise UsageError(f"train '{self._part}': bottlenecks stand behind layers of the language model only.")
            segments = name.split(".")
            found[".".join(segments[: segments.index(number.rstrip("]")) + 1])] = None
        if not found:
            raise UsageError(f"train '{self._part}': has no layers for an adapter to stand behind.")
        return list(found)

    def connector(self) -> str:
        """The connector's module: the largest one that is nothing else.

        Raises:
            UsageError: the model has none.
        """
        sizes: dict[str, int] = {}
        for name, module in self._model.named_modules():
            inside = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
            if inside and all(self.parts.of(one) == "connector" for one in inside):
                sizes[name] = sum(one.numel() for one in module.parameters())
        if not sizes:
            raise UsageError("visual-prompt: this model has no connector; it is for models that see.")
        most = max(sizes.values())
        return min((name for name, size in sizes.items() if size == most), key=len)


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
