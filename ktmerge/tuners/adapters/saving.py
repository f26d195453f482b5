"""The end of a run with an adapter: dense weights and perhaps the adapter beside them, or the adapter as the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktmerge.adapters.saved import save_own
from ktmerge.checkpoints.adapter import CONFIG, WEIGHTS
from ktmerge.tuners.adapters.attach import Adapted
from ktmerge.tuners.adapters.folding import TOLERANCE, fold
from ktmerge.tuners.adapters.starts import ADAPTER, Start
from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.loss import for_model
from ktmerge.tuners.trainer import AnswerTrainer

_PROBED = 32
"""Samples among which the shortest is looked for."""


def save_result(adapted: Adapted, folder: Path, kept: Path, logits: Callable[[Any], Tensor]) -> dict[str, Any]:
    """Write what an adapter came to.

    Args:
        adapted: trained.
        folder: for the folded tensors under transformers' names for files, or for the adapter itself.
        kept: for the adapter, if it is folded and kept.
        logits: what a model says to a sample, fp32.

    Returns:
        what is to be told of it.

    Raises:
        KtmergeError: the folded model says something else than the adapted one.
    """
    if not adapted.adapter.family.folds:
        save_adapter(adapted, folder)
        return {}
    if adapted.adapter.keep:
        save_adapter(adapted, kept)
    changed, far = fold(adapted, logits)
    adapted.model.save_pretrained(folder, state_dict=changed)
    return {"folded": {"tensors": len(changed), "largest_logit_difference": far, "tolerance": TOLERANCE}}


def probe(trainer: AnswerTrainer, samples: Sequence[Encoded]) -> Callable[[Any], Tensor]:
    """What a model says to the shortest of the first samples, fp32 ``[1, tokens, vocabulary]``."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # in bfloat16 no two ways to add agree
    collator: Any = trainer.data_collator
    inputs = trainer._prepare_inputs(collator([min(samples[:_PROBED], key=len)]))
    given = for_model(inputs)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**given, use_cache=False).logits.float()
        return found

    return logits


def save_adapter(adapted: Adapted, folder: Path) -> None:
    """Write the adapter as a folder that `ktmerge eval`, and PEFT if it is one of its own, attach to the base."""
    folder.mkdir(parents=True, exist_ok=True)
    if adapted.peft is None:
        save_own(folder, adapted.model, adapted.settings)
        return
    if adapted.adapter.name == "xlora":
        _save_router(adapted.peft, folder)
        return
    adapted.peft.save_pretrained(str(folder), save_embedding_layers=False)
    for card in folder.rglob("README.md"):  # a form that nobody filled in
        card.unlink()
    if adapted.start is not None:
        _convert(folder, adapted.layers, adapted.start)
    _order_names(folder)


def _order_names(folder: Path) -> None:
    """The same run writes the same bytes: PEFT keeps names as sets, whose order is another in every process."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _save_router(peft_model: Any, folder: Path) -> None:
    """Write X-LoRA's router, and its experts beside it as they were given: PEFT 0.21 writes neither of them right."""
    config = peft_model.peft_config[ADAPTER]
    config.save_pretrained(str(folder))
    for name, source in config.adapters.items():
        (folder / name).mkdir()
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(Path(source) / file, folder / name / file)
    told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    told |= {"adapters": {name: name for name in config.adapters}, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    router = {name: one.detach().contiguous() for name, one in peft_model.named_parameters() if one.requires_grad}
    save_file(router, folder / WEIGHTS, {"format": "pt"})


def _convert(folder: Path, layers: Mapping[str, Any], start: Start) -> None:
    """Rewrite an adapter that changed the weights below it as a LoRA of twice the rank over the true ones.

    ``[B, -B0] [A; A0] = B A - B0 A0``.
    """
    tensors = load_file(folder / WEIGHTS)
    for module, (first, second) in start.factors.items():
        a, b = (f"base_model.model.{module}.{kind}.weight" for kind in ("lora_A", "lora_B"))
        tensors[a] = torch.cat([tensors[a], first.to(tensors[a])])
        tensors[b] = torch.cat([tensors[b], -second.to(tensors[b])], 1)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    layer = next(iter(layers.values()))
    rank = 2 * layer.r[ADAPTER]
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": layer.scaling[ADAPTER] * rank, "init_lora_weights": True, "corda_config": None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
