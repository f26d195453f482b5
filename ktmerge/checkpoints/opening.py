"""From what a recipe calls a model to its checkpoint, whatever kind it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ktmerge.checkpoints.adapter import is_adapter, open_adapter
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.hub import is_folder, resolve
from ktmerge.checkpoints.quantised import dequantise
from ktmerge.errors import UsageError


def open_model(
    reference: str, folder: Path, base: Checkpoint | None = None, *, dequantised: bool = False
) -> Checkpoint:
    """The headers of the model that ``reference`` means.

    Args:
        reference: a folder (relative to ``folder``) or hub id of a checkpoint or of a PEFT adapter, or
            ``model+adapter``.
        folder: where relative paths start.
        base: the model that a lone adapter is folded into; None where there is no such model.
        dequantised: whether quantised weights are shown as the numbers they stand for.

    Raises:
        UsageError: there is no such model, or something is wrong with it.
    """
    path, adapter = locate_model(reference, folder)
    if adapter is not None:
        if is_adapter(path):
            raise UsageError(
                f"{reference}: '{path}' is an adapter itself; several adapters in one model are not folded."
            )
        model = _open(path, dequantised)
        folded = open_adapter(adapter, model)
        other = next((name for name, info in model.tensors.items() if folded[name].shape != info.shape), None)
        if base is None and other is not None:
            raise UsageError(
                f"{reference}: the adapter has another shape of '{other}' than the model, whose configuration and "
                "tokenizer would not fit an output; merge it with PEFT, and save its tokenizer beside it."
            )
        # An output is like its base: the files beside the weights are the whole model's.
        own = folded if base is not None else model
        return replace(folded, root=own.root, other_files=own.other_files, below=(path, adapter))
    if base is not None and is_adapter(path):
        return open_adapter(path, base)
    return _open(path, dequantised)


def _open(path: Path, dequantised: bool) -> Checkpoint:
    found = Checkpoint.open(path)
    return dequantise(found, str(path)) if dequantised else found


def locate_model(reference: str, folder: Path) -> tuple[Path, Path | None]:
    """The folder of the model, and that of the adapter over it, if one is named.

    Raises:
        UsageError: there is no such folder or hub id, or what is named as an adapter is none.
    """
    pluses = [position for position, character in enumerate(reference) if character == "+"]
    if not pluses or is_folder(reference, folder):
        return resolve(reference, folder), None
    splits = [(reference[:plus], reference[plus + 1 :]) for plus in pluses]
    there = [pair for pair in splits if all(is_folder(one, folder) for one in pair)]
    if not there and len(pluses) > 1:
        raise UsageError(
            f"{reference}: means no folders here; write model+adapter. Several adapters over one model are not folded: "
            "give each as an expert of its own."
        )
    model, adapter = there[0] if there else splits[0]
    if not model or not adapter:
        raise UsageError(f"{reference}: write model+adapter, two folders or hub ids.")
    found = resolve(adapter, folder)
    if not is_adapter(found):
        raise UsageError(f"{reference}: '{adapter}' is no PEFT adapter: it has no adapter_config.json.")
    return resolve(model, folder), found
