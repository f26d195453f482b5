"""AdaLoRA's ranks, which fall while it trains: told of every step, and saved, since PEFT's allocator forgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ktmerge.tuners.adapters.starts import ADAPTER

_SCORES, _RANKS = "adalora.safetensors", "adalora.json"
_KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""The allocator's sensitivities of every element."""


class Budget(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Allocates ranks after every step, while its gradients are there; goes into checkpoints and comes out of them."""

    def __init__(self, peft_model: Any) -> None:
        self._tuner = peft_model.base_model
        self._config = peft_model.peft_config[ADAPTER]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tuner.update_and_allocate(int(state.global_step))

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs."""
        allocator = self._tuner.rankallocator
        named = {f"{kind}/{name}": one.contiguous() for kind in _KEPT for name, one in getattr(allocator, kind).items()}
        save_file(named, folder / _SCORES)
        (folder / _RANKS).write_text(json.dumps(self._config.rank_pattern or {}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""
        allocator = self._tuner.rankallocator
        devices = {name: one.device for name, one in self._tuner.model.named_parameters()}
        for path, stored in load_file(folder / _SCORES).items():
            kind, _, name = path.partition("/")
            getattr(allocator, kind)[name] = stored.to(devices.get(name, stored.device))
        self._config.rank_pattern = json.loads((folder / _RANKS).read_text(encoding="utf-8")) or None
