"""PEFT's configuration of each family it has."""

from __future__ import annotations

import math
from typing import Any

import peft
from transformers.pytorch_utils import Conv1D

from ktmerge.errors import UsageError
from ktmerge.recipes.adapters import MOVING, Adapter
from ktmerge.tuners.adapters.targets import Places

_TASK = {"task_type": "CAUSAL_LM"}
_STARTS = {"pissa": "pissa", "olora": "olora", "corda": "corda"}
_SHORTEST = 5
"""Steps under which AdaLoRA's three phases cannot be told apart."""


def peft_config(adapter: Adapter, places: Places, model: Any, *, total: int, seed: int) -> Any:
    """The configuration, for a model that is not changed yet.

    Args:
        adapter: what is asked for.
        places: of the model.
        model: as it was loaded.
        total: steps of the run.
        seed: of what is random and not trained.

    Raises:
        UsageError: a setting does not fit the model.
    """
    library: Any = peft
    if adapter.name in ("prompt", "p-tuning", "prefix"):
        return _virtual_tokens(adapter, model)
    if adapter.name == "llama-adapter":
        return library.AdaptionPromptConfig(
            adapter_len=adapter.used_tokens, adapter_layers=_last_layers(places, model), **_TASK
        )
    if adapter.name == "ia3":
        targets, inside = places.scaled(adapter.modules)
        return library.IA3Config(target_modules=targets, feedforward_modules=inside, **_TASK)
    targets = places.linear(adapter.modules)
    shared: dict[str, Any] = {**_TASK, "target_modules": targets}
    if adapter.name in ("oft", "boft"):
        _require_divisible(model, targets, adapter)
        if adapter.name == "oft":
            return library.OFTConfig(oft_block_size=adapter.block, **shared)
        return library.BOFTConfig(boft_block_size=adapter.block, **shared)
    if adapter.name == "vera":
        return library.VeraConfig(r=adapter.used_rank, vera_dropout=adapter.dropout, projection_prng_key=seed, **shared)
    if adapter.name == "fourierft":  # its spectrum starts at zero, not at PEFT's noise: untrained it is the base
        return library.FourierFTConfig(
            n_frequency=adapter.coefficients, random_loc_seed=seed, init_weights=True, **shared
        )
    if adapter.name == "shira":
        return library.ShiraConfig(r=adapter.used_rank, random_seed=seed, **shared)
    return _low_rank(adapter, model, targets, total, shared)


def _virtual_tokens(adapter: Adapter, model: Any) -> Any:
    """Vectors before the text, or before the keys and values of every layer."""
    library: Any = peft
    tokens = adapter.used_tokens
    if adapter.name == "prompt":
        return library.PromptTuningConfig(num_virtual_tokens=tokens, prompt_tuning_init="SAMPLE_VOCAB", **_TASK)
    if adapter.name == "prefix":
        return library.PrefixTuningConfig(num_virtual_tokens=tokens, **_TASK)
    hidden = model.config.get_text_config().hidden_size
    return library.PromptEncoderConfig(num_virtual_tokens=tokens, encoder_hidden_size=hidden, **_TASK)


def _low_rank(adapter: Adapter, model: Any, targets: list[str], total: int, shared: dict[str, Any]) -> Any:
    """LoRA and what PEFT makes of it by another start, scale, or schedule of ranks."""
    library: Any = peft
    shared |= {"lora_alpha": adapter.used_alpha, "lora_dropout": adapter.dropout}
    shared |= {"fan_in_fan_out": isinstance(model.get_submodule(targets[0]), Conv1D)}
    if adapter.name in MOVING:
        _require_rank(model, targets, adapter)
    if adapter.name == "adalora":
        return _adalora(adapter, total, shared)
    if adapter.name == "corda":
        from peft.tuners.lora.config import CordaConfig

        kind: Any = CordaConfig
        shared |= {"corda_config": kind(corda_method="kpm")}
    return library.LoraConfig(
        r=adapter.used_rank,
        use_rslora=adapter.name == "rslora",
        use_dora=adapter.name == "dora",
        init_lora_weights=_STARTS.get(adapter.name, True),
        **shared,
    )


def _adalora(adapter: Adapter, total: int, shared: dict[str, Any]) -> Any:
    """Ranks start at one and a half times the target, fall through the middle of the run, and rest in its last fifth.

    Raises:
        UsageError: the run is too short.
    """
    if total < _SHORTEST:
        raise UsageError(
            f"adalora: its ranks fall over the run, which needs {_SHORTEST} steps, and this one has {total}."
        )
    config: Any = peft.AdaLoraConfig
    return config(
        target_r=adapter.used_rank,
        init_r=math.ceil(1.5 * adapter.used_rank),
        total_step=total,
        tinit=total // 10,
        tfinal=total // 5,
        deltaT=max(1, total // 100),
        **shared,
    )


def _last_layers(places: Places, model: Any) -> int:
    """How many layers LLaMA-Adapter goes into, which are always the last ones.

    Raises:
        UsageError: others are asked for, or PEFT has no such adapter for this architecture.
    """
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG as KNOWN

    kind = model.config.model_type
    if kind not in KNOWN:
        raise UsageError(f"llama-adapter: PEFT has it for {', '.join(KNOWN)}, not for {kind}; use bottleneck or lora.")
    layers = places.layers()
    there = places.parts.layers["llm"]
    numbers = [int(name.rpartition(".")[2]) for name in layers]
    if numbers != list(range(there - len(layers), there)):
        raise UsageError("llama-adapter goes into the last layers; write train: last:K.")
    return len(layers)


def _require_rank(model: Any, targets: list[str], adapter: Adapter) -> None:
    for name in targets:
        most = min(model.get_submodule(name).weight.shape)
        if adapter.used_rank > most:
            raise UsageError(
                f"{adapter.name}: '{name}' has {most} singular directions, not the {adapter.used_rank} of rank."
            )


def _require_divisible(model: Any, targets: list[str], adapter: Adapter) -> None:
    for name in targets:
        module = model.get_submodule(name)
        width = module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features
        if width % adapter.block:
            raise UsageError(
                f"adapter.block {adapter.block}: does not divide the {width} inputs of '{name}'; choose a divisor, "
                f"e.g. {math.gcd(width, adapter.block)}."
            )
