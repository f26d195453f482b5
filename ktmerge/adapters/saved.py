"""A folder with an adapter in it, written, and attached again to a loaded model: PEFT's format, or ktmerge's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.adapter import CONFIG, WEIGHTS
from ktmerge.checkpoints.layout import read_json
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.errors import UsageError, first_line

OWN = "KTMERGE"
"""What stands for the type in the configuration of an adapter that PEFT does not know."""


def save_own(folder: Path, model: Any, settings: Mapping[str, Any]) -> None:
    """Write the trained parameters of a model with one of ktmerge's own adapters.

    Args:
        folder: is there; gets a configuration and the weights.
        model: has the adapter, which alone is trained.
        settings: ``kind`` (bottleneck, conditioned, visual-prompt, prompt) and what `attach_own` needs for it:
            ``places`` with ``width``, or with ``tokens`` and ``size``; ``shape``.
    """
    from safetensors.torch import save_file

    tensors = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    if settings["kind"] == "prompt":
        from ktmerge.adapters.prompt import prompt_tensors

        tensors = prompt_tensors(model)
    tensors = {name: one.contiguous() for name, one in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    text = json.dumps({"peft_type": OWN, **settings}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def attach_saved(model: Any, folder: Path) -> Any:
    """The model with the adapter of ``folder``, for inference.

    Args:
        model: a loaded transformers model; changed.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        UsageError: it is not whole, of another model, or of a kind that PEFT does not know.
    """
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise UsageError(f"{folder}: has no {WEIGHTS}; save the adapter as safetensors (PeftModel.save_pretrained).")
    if config.get("peft_type") == OWN:
        before = {name for name, _ in model.named_parameters()}
        attach_own(model, folder, config)
        missing = {name for name, _ in model.named_parameters()} - before - _fill(model, folder)
        if missing:
            raise UsageError(f"{folder}: the adapter's '{min(missing)}' is not in {WEIGHTS}; save the adapter again.")
        return model.eval()
    return _by_peft(model, folder)


def attach_own(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Attach one of ktmerge's own adapters, untrained, as its configuration says.

    Raises:
        UsageError: the configuration is not one, or the model has no such places.
    """
    from ktmerge.adapters.bottleneck import attach_bottlenecks
    from ktmerge.adapters.prompt import attach_prompt_of
    from ktmerge.adapters.visual import attach_visual_prompt

    try:
        if config["kind"] == "prompt":
            attach_prompt_of(model, config["shape"])
        elif config["kind"] == "visual-prompt":
            attach_visual_prompt(model, config["places"][0], config["size"], config["tokens"])
        else:
            conditioned = {"bottleneck": False, "conditioned": True}[config["kind"]]
            attach_bottlenecks(model, config["places"], config["width"], conditioned=conditioned)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UsageError(f"{folder}: its {CONFIG} does not fit this model: {first_line(error)}.") from None


def _fill(model: Any, folder: Path) -> set[str]:
    """Copy the adapter's tensors into a model; returns their names."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    own = dict(model.named_parameters())
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS}: cannot be read: {first_line(error)}.") from None
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UsageError(f"{folder}: the adapter's '{name}' does not fit this model; it belongs to another one.")
        with torch.no_grad():
            own[name].copy_(tensor)
    return set(tensors)


def _by_peft(model: Any, folder: Path) -> Any:
    from peft import PeftConfig, PeftModel

    for said in ("Position ids are not supported", "`is_gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", message=said)  # at every forward pass of a prompt, which takes none
    loader: Any = PeftModel
    reader: Any = PeftConfig
    from safetensors import SafetensorError

    try:
        config = reader.from_pretrained(str(folder))
        if config.peft_type == "XLORA":
            model.config.use_cache = False  # X-LoRA refuses a model that has it
            config.adapters = {name: str(folder / Path(name).name) for name in config.adapters}
        with quiet_transformers(), warnings.catch_warnings():
            if config.peft_type != "XLORA":  # whose base is not among its weights
                warnings.filterwarnings("error", message="Found missing adapter keys")
            found = loader.from_pretrained(model, str(folder), config=config, is_trainable=False).eval()
        if config.peft_type == "XLORA":
            _fill(found, folder)  # PEFT passes over a router that is not there
    except UserWarning:
        raise UsageError(f"{folder / WEIGHTS}: not all of the adapter is in it; save the adapter again.") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        raise UsageError(f"{folder}: PEFT cannot attach this adapter to the model: {first_line(error)}") from error
    if getattr(found.active_peft_config, "is_prompt_learning", False):
        _answer_tokens_only(found)
    return found


def _answer_tokens_only(model: Any) -> None:
    """Have a model with a prompt before its tokens give logits for the tokens, one for each, as any other model."""
    lengths: list[int] = []

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        lengths[:] = [kwargs["input_ids"].shape[1]] if kwargs.get("input_ids") is not None else []

    def end(*_: Any) -> None:
        lengths.clear()

    def drop(_: Any, args: Any) -> Any:
        return (args[0][:, -lengths[0] :], *args[1:]) if lengths and args[0].shape[1] > lengths[0] else None

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, always_call=True)
    model.get_output_embeddings().register_forward_pre_hook(drop)
