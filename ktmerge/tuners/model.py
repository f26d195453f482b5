"""The model that is trained: a checkpoint as transformers loads it, with fp32 weights."""

from __future__ import annotations

from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError, first_line
from ktmerge.progress import Progress
from ktmerge.tuners.machine import is_out_of_memory


def load_model(base: Checkpoint, progress: Progress, *, sees: bool = False) -> Any:
    """The model of a checkpoint with fp32 weights.

    Args:
        base: the checkpoint.
        progress: told of tensors that are no part of the model.
        sees: whether it is a model that takes images beside text.

    Raises:
        UsageError: transformers has no model of this kind, or the checkpoint lacks weights of it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        model, found = loader.from_pretrained(
            base.root,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # broken configurations end in errors of every type
        if is_out_of_memory(error):
            raise
        what = "vision-language" if sees else "text"
        kind = base.config.get("model_type", "unknown")
        raise UsageError(
            f"{base.root}: cannot be loaded as a {what} model (its type is '{kind}'): {first_line(error)}"
        ) from None
    missing = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if missing:
        raise UsageError(f"{base.root}: lacks {len(missing)} weights of its own model, e.g. '{missing[0]}'.")
    unused = sorted(map(str, found["unexpected_keys"]))
    if unused:
        progress.note(f"{len(unused)} tensors are no part of the text model and stay as they are, e.g. '{unused[0]}'.")
    return model


def trained_state(model: Any) -> dict[str, Any]:
    """What of a model's state is trained, under all of its names; the rest is still as in the base."""
    frozen = {name for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
