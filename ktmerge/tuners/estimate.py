"""How much memory a fine-tune takes, from the base's headers and configuration alone. Loads no torch.

What is counted exactly: weights, gradients, the optimizer's state and what is kept beside them. Activations and logits
follow from the tokens of a forward pass; of a model with images as if all of them were an image's.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.limits import context_length
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.recipes.adapters import Adapter
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.adapters.size import SCALED, SCALED_INSIDE, AdapterSize, Shapes, size_of
from ktmerge.tuners.loss import PIECE_TOKENS
from ktmerge.tuners.machine import GRADIENT_BYTES, WEIGHT_BYTES, kept_bytes, state_bytes
from ktmerge.tuners.processes import passes_of, require_shareable
from ktmerge.tuners.trained import header_matcher

MARGIN = 0.25
"""How far off the sum may be: of peaks measured on a CPU, at full length and all tokens trained, all were within."""
_RUNTIME = {"cpu": 600e6, "cuda": 1200e6}
"""Bytes of the libraries themselves; on a GPU its context and workspaces, which were not measured."""
_HIDDEN_KEPT, _INNER_KEPT = 12, 6
"""Numbers kept for the backward pass, per token and layer: vectors of the hidden and of the inner size; measured."""
_SHORT = ("BF16", "F16")
_LOGIT_BYTES = {"float32": 12.0, "bfloat16": 16.0}
"""Per trained token and word: logits, their logarithms, gradients."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process by what they are for, and how they were reckoned.

    Attributes:
        parts: what, and bytes.
        processes: that share the model.
        device, precision: assumed.
        tokens: of a forward pass.
        alternatives: settings that would change it, with the bytes then.
    """

    parts: Mapping[str, float]
    processes: int
    device: str
    precision: str
    tokens: int
    alternatives: Mapping[str, float]

    @property
    def total(self) -> float:
        """All together."""
        return sum(self.parts.values())

    def pairs(self) -> dict[str, str]:
        """The table as text."""
        found = {what: gigabytes(count) for what, count in self.parts.items()}
        found["together"] = f"{gigabytes(self.total)}, give or take {MARGIN:.0%}"
        found["reckoned for"] = (
            f"{self.processes} {'process' if self.processes == 1 else 'processes, each'} on {self.device}, "
            f"{self.precision}, {self.tokens} tokens in a pass, all of them trained"
        )
        return found | {f"with {setting}": gigabytes(count) for setting, count in self.alternatives.items()}

    def to_json(self) -> dict[str, Any]:
        """In bytes."""
        return {
            "bytes": {what: round(count) for what, count in self.parts.items()},
            "total": round(self.total),
            "margin": MARGIN,
            "processes": self.processes,
            "device": self.device,
            "precision": self.precision,
            "tokens": self.tokens,
            "alternatives": {setting: round(count) for setting, count in self.alternatives.items()},
        }


def estimate(
    job: FinetuneJob,
    base: Checkpoint,
    processes: int = 1,
    *,
    device: Literal["cpu", "cuda"] | None = None,
    longest: int | None = None,
) -> Estimate:
    """Of the peak of one process.

    Args:
        job: what is to be done.
        base: its base; of its files only headers are read.
        processes: that share the model.
        device: what it runs on; by default CUDA for several processes or where there is one.
        longest: tokens of the longest sample; by default as many as the job admits.

    Raises:
        UsageError: ``train`` matches nothing, or the processes cannot do this together.
    """
    require_shareable(job, processes)
    place = device or ("cuda" if processes > 1 or os.path.exists("/dev/nvidiactl") else "cpu")
    given = longest or min(job.max_length, context_length(base.config) or job.max_length)
    model = _Model(base, job)
    parts, tokens, precision = _reckon(job, model, processes, place, given)
    now = sum(parts.values())
    others = {}
    for setting, (changed, count) in _alternatives(job, processes).items():
        try:
            changed_model = model if changed.train == job.train else _Model(base, changed)
        except UsageError:  # it has fewer layers
            continue
        length = min(given, changed.max_length)
        total = sum(_reckon(changed, changed_model, count, place, length)[0].values())
        if total < 0.98 * now:
            others[setting] = total
    return Estimate(parts, processes, place, precision, tokens, others)


def gigabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB"


class _Tower:
    """The shape of one stack of layers, as its section of the configuration says.

    Attributes:
        kept: layers that keep activations: from the first that is trained, or passes gradients on, to the last.
    """

    def __init__(self, section: Mapping[str, Any], layers: int, first: int) -> None:
        self.hidden = int(_first(section, "hidden_size", "n_embd", "d_model", "embed_dim") or 0)
        self.inner = int(_first(section, "intermediate_size", "n_inner", "ffn_dim") or 4 * self.hidden)
        self.kept, self.layers = max(0, layers - first), layers

    def bytes(self, tokens: float, width: float, *, checkpointed: bool) -> float:
        layer = tokens * (_HIDDEN_KEPT * self.hidden + _INNER_KEPT * self.inner) * width
        if not self.kept:
            return layer if self.layers else 0.0
        return layer + self.kept * tokens * self.hidden * width if checkpointed else self.kept * layer


class _Model:
    """What headers and configuration tell of a model, and of what is trained: its own weights, or an adapter."""

    def __init__(self, base: Checkpoint, job: FinetuneJob) -> None:
        parts, wanted = header_matcher(base, job)
        sizes = {name: info.numel for name, info in base.tensors.items() if info.is_float}
        self.parameters = sum(sizes.values())
        blocks: dict[str, int] = defaultdict(int)
        for name, size in sizes.items():
            part = parts.of(name)
            blocks[part if ".layers[" in part else ""] += size
        self.rest = blocks.pop("", 0)
        self.block = max(blocks.values(), default=0)
        moving = {parts.of(name) for name in sizes if wanted(name)}
        config = base.config
        text = config.get("text_config")
        section = text if isinstance(text, Mapping) else config
        sees = {part for part in moving if part.startswith(("vision", "connector"))}
        early = bool(sees or "embed" in moving)
        self.text = _Tower(section, parts.layers.get("llm", 0), 0 if early else _lowest(moving, "llm"))
        vision = config.get("vision_config")
        seen = vision if isinstance(vision, Mapping) else {}
        count = parts.layers.get("vision", 0)
        below = "vision" in moving
        self.vision = _Tower(seen, count, 0 if below else min(count, _lowest(moving, "vision", count)))
        self.patches = int(seen.get("spatial_merge_size") or 1) ** 2
        """Patches of an image for each of its tokens."""
        self.words = int(_first(section, "vocab_size") or 0)
        self.adapter = AdapterSize(sum(size for name, size in sizes.items() if wanted(name)))
        if job.adapter is not None:
            named = [name for name in sizes if wanted(name)]
            self.adapter = size_of(job.adapter, _shapes(job.adapter, base, parts, named, section))
        self.trained = self.adapter.trained
        self.splits = not seen and (job.adapter is None or job.adapter.family.aligned)
        """Whether a CPU works on pieces of a batch: not where pixels are not rows, nor where answers are not tokens."""


def _shapes(adapter: Adapter, base: Checkpoint, parts: Parts, named: list[str], section: Mapping[str, Any]) -> Shapes:
    """What the adapter will find in the named tensors; of the output head nothing."""
    maps: dict[str, tuple[int, int]] = {}
    for name in named:
        module, _, leaf = name.rpartition(".")
        info = base.tensors[name]
        is_map = leaf == "weight" and tensor_class(name, info, base.config) == "matrix" and parts.of(name) != "head"
        wanted = not adapter.modules or any(f".{module}".endswith(f".{one}") for one in adapter.modules)
        scaled = adapter.name != "ia3" or adapter.modules or module.rpartition(".")[2] in (*SCALED, *SCALED_INSIDE)
        if is_map and wanted and scaled:
            maps[module] = (info.shape[0], info.shape[1])
    layers = {parts.of(name) for name in named if parts.of(name).startswith("llm.layers[")}
    return Shapes(maps, len(layers), section, 2 if all(base.tensors[name].dtype in _SHORT for name in named) else 4)


def _reckon(
    job: FinetuneJob, model: _Model, processes: int, device: str, longest: int
) -> tuple[dict[str, float], int, str]:
    precision = job.precision if job.precision != "auto" else "bfloat16" if device == "cuda" else "float32"
    size, _ = passes_of(job.batch_size, job.gradient_accumulation, processes)
    if job.adapter is not None and not job.adapter.family.aligned:
        longest += job.adapter.prompt_length
    tokens = size * longest
    if device == "cpu" and processes == 1 and not job.optimizer_in_backward and model.splits:
        tokens = min(tokens, max(PIECE_TOKENS, longest))
    width = 2.5 if precision == "bfloat16" else 4.0
    checkpointed = job.activation_checkpointing
    activations = model.text.bytes(tokens, width, checkpointed=checkpointed)
    activations += model.vision.bytes(tokens * model.patches, width, checkpointed=checkpointed)
    adapted = tokens * model.adapter.inner * width + model.adapter.dense
    activations += adapted / max(1, model.text.kept) if checkpointed else adapted
    gathered = 0.0
    if processes > 1:  # the block at work and the next, and what is in no block, with their gradients
        gathered = (2 * WEIGHT_BYTES + GRADIENT_BYTES) * model.block + (WEIGHT_BYTES + GRADIENT_BYTES) * model.rest
    gradients = 0.0 if job.optimizer_in_backward else GRADIENT_BYTES
    found = {
        "weights": WEIGHT_BYTES * model.parameters / processes,
        "gradients": gradients * model.trained / processes,
        "optimizer": state_bytes(job) * model.trained / processes,
        "kept of the base, averages": kept_bytes(job) * model.trained / processes,
        "kept beside the adapter": model.adapter.beside,
        "put together of shards": gathered,
        "activations": activations,
        "logits": tokens * model.words * _LOGIT_BYTES[precision],
        "libraries": _RUNTIME[device],
    }
    return {what: count for what, count in found.items() if count}, tokens, precision


def _alternatives(job: FinetuneJob, processes: int) -> dict[str, tuple[FinetuneJob, int]]:
    """Settings to try, with the number of processes; only some of them will save anything."""
    found: dict[str, tuple[dict[str, Any], int]] = {
        f"batch_size={job.batch_size // 2}, gradient_accumulation={2 * job.gradient_accumulation}": (
            {"batch_size": job.batch_size // 2, "gradient_accumulation": 2 * job.gradient_accumulation},
            processes,
        ),
        "activation_checkpointing=true": ({"activation_checkpointing": True}, processes),
        f"max_length={job.max_length // 2}": ({"max_length": job.max_length // 2}, processes),
        "train=last:4": ({"train": "last:4"}, processes),
        "select=gradient, density 0.1": ({"select": "gradient"}, processes),
        f"{2 * processes} processes": ({}, 2 * processes),
    }
    if job.batch_size % 2:
        found = dict(list(found.items())[1:])
    if job.select != "none":
        found.pop("select=gradient, density 0.1")
    tried = {}
    for setting, (changes, count) in found.items():
        changed = job.model_copy(update=changes)
        if changed.batch_size * changed.gradient_accumulation % count == 0:
            tried[setting] = (changed, count)
    return tried


def _lowest(moving: set[str], tower: str, count: int = 0) -> int:
    layers = [int(part.rpartition("[")[2].rstrip("]")) for part in moving if part.startswith(f"{tower}.layers[")]
    return min(layers, default=count)


def _first(section: Mapping[str, Any], *keys: str) -> Any:
    return next((section[key] for key in keys if section.get(key) is not None), None)
