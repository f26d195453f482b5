"""From a loaded model and a job to what is trained: the adapter, which of it moves, what is added to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

from ktmerge.adapters.bottleneck import attach_bottlenecks
from ktmerge.adapters.prompt import attach_prompt
from ktmerge.adapters.visual import attach_visual_prompt
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError, first_line
from ktmerge.recipes.adapters import MOVING, Adapter
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.adapters.budget import Budget
from ktmerge.tuners.adapters.configs import peft_config
from ktmerge.tuners.adapters.penalties import Penalty, penalty_of
from ktmerge.tuners.adapters.starts import (
    ADAPTER,
    Start,
    keep_directions_of,
    start_at_minor_components,
)
from ktmerge.tuners.adapters.targets import Places
from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.report import reference_of
from ktmerge.tuners.trained import Trained, choose_adapted

_WRAPPED = ("prompt", "p-tuning", "prefix", "xlora")
"""What PEFT computes around the model; the others are inside it, and it is trained as the model it is."""
_OWN = ("bottleneck", "conditioned", "visual-prompt")
_PROMPTS = ("prompt", "p-tuning", "prefix")
"""PEFT's for models of text; before models that see it would hide their images from them."""


@dataclass(frozen=True)
class Adapted:
    """A model with an adapter.

    Attributes:
        adapter: what was asked for.
        model: what is trained.
        trained: the parameters that move.
        peft: PEFT's wrapping of the model; None of ktmerge's own adapters.
        layers: PEFT's adapted layers, by module.
        start: what the weights were, if the adapter changed them.
        penalty: what is added to the loss.
        budget: AdaLoRA's ranks.
        settings: what one of ktmerge's own adapters is attached by.
    """

    adapter: Adapter
    model: Any
    trained: Trained
    peft: Any = None
    layers: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    penalty: Penalty | None = None
    budget: Budget | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Surroundings:
    """What an adapter may need beside its model.

    Attributes:
        total: steps of the run.
        upstream: samples whose directions CorDA keeps.
        collator: makes batches of them.
        folder: where the job's relative paths start.
    """

    total: int
    upstream: Sequence[Encoded]
    collator: Any
    folder: Path


def attach(model: Any, base: Checkpoint, job: FinetuneJob, around: Surroundings) -> Adapted:
    """Attach the job's adapter; everything else is frozen.

    Args:
        model: as it was loaded; changed.
        base: what was loaded.
        job: with an adapter.
        around: what else is needed.

    Raises:
        UsageError: it does not fit the model.
    """
    adapter = job.adapter
    if adapter is None:
        raise ValueError("the job has no adapter")
    model.requires_grad_(False)
    if adapter.name in _OWN or (adapter.name in _PROMPTS and sees(model)):
        settings = _attach_own(model, adapter, Places(model, base, job))
        return Adapted(adapter, model, choose_adapted(model, base, job), settings=settings)
    return _attach_by_peft(model, base, job, adapter, around)


def sees(model: Any) -> bool:
    """Whether a model takes images."""
    return getattr(model.config, "vision_config", None) is not None


def _attach_own(model: Any, adapter: Adapter, places: Places) -> dict[str, Any]:
    if adapter.name in _PROMPTS:
        return {"kind": "prompt", **attach_prompt(model, adapter.name, adapter.used_tokens)}
    if adapter.name == "visual-prompt":
        place, size = places.connector(), model.config.get_text_config().hidden_size
        attach_visual_prompt(model, place, size, adapter.used_tokens)
        return {"kind": adapter.name, "places": [place], "size": size, "tokens": adapter.used_tokens}
    layers = places.layers()
    attach_bottlenecks(model, layers, adapter.used_rank, conditioned=adapter.name == "conditioned")
    return {"kind": adapter.name, "places": layers, "width": adapter.used_rank}


def _attach_by_peft(model: Any, base: Checkpoint, job: FinetuneJob, adapter: Adapter, around: Surroundings) -> Adapted:
    library: Any = peft
    config = _router(model, adapter, around.folder) if adapter.name == "xlora" else None
    if config is None:
        config = peft_config(adapter, Places(model, base, job), model, total=around.total, seed=job.seed)
    start = None
    if adapter.name in MOVING:
        start = Start({name: model.get_submodule(name).weight for name in config.target_modules})
    if adapter.name == "corda":
        keep_directions_of(around.upstream, model, config, adapter, around.collator, job.seed)
    try:
        wrapped = library.get_peft_model(model, config)
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"adapter {adapter.name}: PEFT cannot attach it to this model: {first_line(error)}") from error
    wrapped.peft_config[ADAPTER].base_model_name_or_path = reference_of(base.root)
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    layers: dict[str, Any] = {} if adapter.name == "xlora" else found
    if adapter.name == "milora":
        start_at_minor_components(layers)
    if start is not None:
        start.remember(layers)
    trained = wrapped if adapter.name in _WRAPPED else model
    return Adapted(
        adapter,
        trained,
        choose_adapted(trained, base, job),
        wrapped,
        layers,
        start,
        penalty_of(adapter, layers, wrapped, job.seed),
        Budget(wrapped) if adapter.name == "adalora" else None,
    )


def _router(model: Any, adapter: Adapter, folder: Path) -> Any:
    """X-LoRA's configuration: only what routes between the experts is trained.

    Raises:
        UsageError: an expert is no folder with a LoRA adapter.
    """
    from ktmerge.checkpoints.adapter import CONFIG, is_adapter
    from ktmerge.checkpoints.layout import read_json

    paths = [folder / Path(expert).expanduser() for expert in adapter.experts]
    for given, path in zip(adapter.experts, paths, strict=True):
        if not is_adapter(path) or read_json(path / CONFIG).get("peft_type") != "LORA":
            raise UsageError(f"adapter.experts '{given}': is no folder with a LoRA adapter (adapter_config.json).")
    model.config.use_cache = False  # PEFT refuses a model that has it
    library: Any = peft
    return library.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.get_text_config().hidden_size,
        adapters={str(number): str(path) for number, path in enumerate(paths)},
    )
