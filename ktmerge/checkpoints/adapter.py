"""PEFT adapters: which tensors of a model a LoRA or DoRA changes, shown as a checkpoint, folded while it is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.adapted import HEAD, PREFIX, AdaptedModule, Block, fits, understand
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.derived import Derived, DerivedReader, Made, shown
from ktmerge.checkpoints.dtypes import FLOATS
from ktmerge.checkpoints.header import FileStamp, TensorInfo, read_header
from ktmerge.checkpoints.layout import files_beside, read_json
from ktmerge.checkpoints.reader import Reader, TensorReader
from ktmerge.checkpoints.rows import Gathered, Table, runs_of
from ktmerge.checkpoints.tying import TABLE, ties
from ktmerge.errors import UsageError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Settings under which the sum of weight and product is not what was trained, and why.
_UNKNOWN = {
    "layer_replication": "repeats layers of its model (layer_replication)",
    "use_qalora": "pools its inputs (use_qalora)",
    "use_bdlora": "is block-diagonal (use_bdlora)",
    "alora_invocation_tokens": "acts after an invocation only (alora_invocation_tokens)",
    "arrow_config": "chooses among adapters while it runs (arrow_config)",
    "kasa_config": "is KaSA (kasa_config)",
    "monteclora_config": "is random (monteclora_config)",
    "megatron_config": "is of a Megatron model (megatron_config)",
}
_MOVES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / CONFIG).exists()


def open_adapter(folder: Path, model: Checkpoint) -> Derived:
    """The adapter in ``folder`` over ``model``: adapted tensors in F32, the others as the model has them.

    Raises:
        UsageError: it is no LoRA or DoRA, cannot be expressed in weights, or doesn't fit the model.
    """
    config = read_json(folder / CONFIG)
    _require_foldable(folder, config)
    if not (folder / WEIGHTS).exists():
        other = "only adapter_model.bin, a pickle" if (folder / "adapter_model.bin").exists() else f"no {WEIGHTS}"
        raise UsageError(f"{folder}: has {other}; save the adapter again as safetensors (PeftModel.save_pretrained).")
    header = read_header(folder / WEIGHTS, WEIGHTS)
    own_tensors = {info.name: info for info in header.tensors}
    stored = {info.name.removeprefix(PREFIX): info for info in header.tensors}
    modules, replaced, trained = understand(folder, config, stored, model)
    tensors = dict(model.tensors)
    for name, info in replaced.items():
        file = model.tensors[name].file if name in model.tensors else model.weight_files[-1]
        tensors[name] = shown(TensorInfo(name, info.dtype, info.shape, file, 0, 0))
    parts: dict[str, list[tuple[AdaptedModule, Block]]] = {}
    for module in modules:
        for block in module.blocks:
            tensors[block.name] = _shown_folded(folder, module, block.name, replaced.get(block.name), model)
            parts.setdefault(block.name, []).append((module, block))
    for name, rows in trained.items():
        tensors[name] = shown(model[name], _wide(model[name], rows.values))
    tied = {module.blocks[0].name for module in modules if module.tied} | trained.keys()
    if config.get("ensure_weight_tying"):
        tied |= {name for name in replaced if name.endswith("embed_tokens.weight")}  # PEFT knows no other name
    _require_tied_together(folder, {name: info for name, info in tensors.items() if name not in tied}, model)
    stamps = {WEIGHTS: header.stamp, CONFIG: FileStamp.of(os.stat(folder / CONFIG))}

    def opened() -> DerivedReader:
        from ktmerge.checkpoints.folding import Shelf, fold

        weights, own, shelf = model.reader(), TensorReader(folder, own_tensors, stamps), Shelf()
        made: dict[str, Made] = {name: _Replaced(info, own) for name, info in replaced.items()}
        for name, found in parts.items():
            whole = replaced.get(name)
            original = model.tensors[name] if whole is None else whole
            made[name] = fold(found, tensors[name], original, weights if whole is None else own, own, shelf)
        for name, rows in trained.items():
            sources: list[list[tuple[int, int]]] = [[(0, row)] for row in range(model[name].shape[0])]
            for number, row in enumerate(rows.indices):
                sources[row] = [(1, number)]
            tables = [Table(model[name], weights), Table(rows.values, own)]
            made[name] = Gathered(tensors[name], tables, runs_of(sources))
        return DerivedReader(tensors, weights, made, [own])

    carried, left_behind = files_beside(folder, {WEIGHTS})
    changed = model.tensors.keys() & {*replaced, *trained, *parts}
    own_types = {name: model.written.get(name, model[name].dtype) for name in changed if model[name].is_float}
    return Derived(
        root=folder,
        tensors=tensors,
        config=model.config,
        weight_files=model.weight_files,
        index_file=model.index_file,
        other_files=carried,
        left_behind=left_behind,
        metadata=model.metadata,
        stamps={**stamps, **{f"model/{file}": stamp for file, stamp in model.stamps.items()}},
        notes=(*model.notes, *_notes(config, model, len({*replaced, *trained, *parts}))),
        branches=model.branches,
        written={**model.written, **own_types},
        stale=model.stale,
        below=model.roots,
        opened=opened,
    )


@dataclass(frozen=True)
class _Replaced:
    """A tensor that the adapter stores whole."""

    info: TensorInfo
    own: Reader

    def fill(self, start: int, target: memoryview) -> None:
        self.own.read_into(self.info.name, start, target)


def _require_foldable(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise UsageError(
            f"{folder}: is a PEFT adapter of the type {kind}, which is not a change of weights that ktmerge can fold "
            "(LoRA, DoRA and trainable tokens are); merge it with PEFT where it can, and give the whole model."
        )
    for key, reason in _UNKNOWN.items():
        if config.get(key):
            raise UsageError(f"{folder}: the adapter {reason}, which cannot be folded into weights tensor by tensor.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE):
        raise UsageError(
            f"{folder}: the adapter began as {start}, which changed the weights below it, too; convert it to a plain "
            "LoRA when saving (path_initial_model_for_weight_conversion), or merge it with PEFT."
        )


def _shown_folded(
    folder: Path, module: AdaptedModule, name: str, replaced: TensorInfo | None, model: Checkpoint
) -> TensorInfo:
    """The header entry of a folded tensor, once the factors are known to fit it."""
    info = model.tensors[name]
    if info.dtype not in FLOATS:
        raise UsageError(
            f"{folder}: the adapter changes '{name}', which is quantised in {model.root}; fold it over the "
            "unquantised model, or say dequantise."
        )
    if not fits(module):
        shapes = " and ".join(str(list(found.shape)) for found in module.factors.values())
        raise UsageError(
            f"{folder}: the adapter's factors of '{module.name}' have shapes {shapes}, which do not fit its "
            f"{list(module.shape)}; it belongs to another model."
        )
    return shown(info, _wide(info, *(() if replaced is None else (replaced,))), (replaced or info).shape)


def _wide(*infos: TensorInfo) -> str:
    return "F64" if any(info.dtype == "F64" for info in infos) else "F32"


def _require_tied_together(folder: Path, tensors: Mapping[str, TensorInfo], model: Checkpoint) -> None:
    """Refuse what was trained for the embedding alone where the head is the same tensor: no file could hold it."""
    if not ties(model.config):
        return
    vocabulary = [
        name
        for name in tensors
        if name.endswith(".weight") and tensor_class(name, tensors[name], model.config) == "embed"
    ]
    heads = [name for name in vocabulary if HEAD.search(name)]
    changed = [name for name in vocabulary if TABLE.search(name) and tensors[name] is not model.tensors.get(name)]
    if changed and not heads:
        raise UsageError(
            f"{folder}: the adapter was trained on '{changed[0]}' but not on the head, which {model.root} ties to it: "
            "as one tensor they cannot differ. Untie the model first, or train with ensure_weight_tying."
        )


def _notes(config: Mapping[str, Any], model: Checkpoint, count: int) -> list[str]:
    told = str(config.get("base_model_name_or_path") or "")
    doubt = f"; it says it was trained on '{Path(told).name}', make sure that this is the same" if told else ""
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    kind = "trainable-tokens" if config.get("peft_type") == "TRAINABLE_TOKENS" else kind
    return [f"a {kind} adapter, folded into {count} tensors of {model.root.name}{doubt}."]
