"""Bottleneck adapters behind the layers of a model: one function for all samples, or one that heeds the sample.

Shared (arXiv 1902.00751): ``h + U gelu(D h)``. Conditioned: ``h + U (gelu(D h) * (1 + C c))``, where c at a token is
the mean of the hidden states of its sample up to there, so that a language model stays causal. Both start as nothing:
U, and C, are zero.

Imports torch; import it only where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "bottleneck"
"""Of the module inside a layer."""


class Bottleneck(nn.Module):
    """``h + U gelu(D h)`` with D ``[width, size]`` and U ``[size, width]``, both with biases."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, width)
        self.up = nn.Linear(width, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[samples, tokens, size]`` to the same."""
        inner: Tensor = self.up(self._scaled(functional.gelu(self.down(hidden.to(self.up.weight.dtype))), hidden))
        return hidden + inner.to(hidden.dtype)

    def _scaled(self, inner: Tensor, hidden: Tensor) -> Tensor:
        return inner


class ConditionedBottleneck(Bottleneck):
    """A bottleneck whose units are scaled by what the sample holds so far; ``mask`` says which tokens are there."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width)
        self.condition = nn.Linear(size, width, bias=False)
        nn.init.zeros_(self.condition.weight)
        self.mask: Tensor | None = None

    def _scaled(self, inner: Tensor, hidden: Tensor) -> Tensor:
        there = hidden.new_ones(hidden.shape[:2]) if self.mask is None else self.mask
        weights = there.to(torch.float32).unsqueeze(-1)
        mean = (hidden.float() * weights).cumsum(1) / weights.cumsum(1).clamp(min=1.0)
        scale: Tensor = self.condition(mean.to(inner.dtype))
        return inner * (1 + scale)


def attach_bottlenecks(model: Any, places: Iterable[str], width: int, *, conditioned: bool) -> None:
    """Put a bottleneck behind each layer of a model.

    Args:
        model: a transformers model; changed.
        places: names of the layers' modules.
        width: of the bottlenecks.
        conditioned: whether they heed the sample.
    """
    size = model.config.get_text_config().hidden_size
    for place in places:
        layer = model.get_submodule(place)
        made = ConditionedBottleneck(size, width) if conditioned else Bottleneck(size, width)
        weight = next(layer.parameters())
        layer.add_module(NAME, made.to(weight.device, weight.dtype))
        layer.register_forward_hook(_behind)
    if conditioned:
        model.register_forward_pre_hook(_tell_mask, with_kwargs=True)
        # a cache would show the layers the newest token only, and not what the sample held before it
        model.generate = partial(model.generate, use_cache=False)


def _behind(layer: Any, inputs: Any, outputs: Any) -> Any:
    adapter = getattr(layer, NAME)
    return (adapter(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else adapter(outputs)


def _tell_mask(model: Any, args: Any, kwargs: Any) -> None:
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError("conditioned adapters need a mask of samples and tokens")
    for module in model.modules():
        if isinstance(module, ConditionedBottleneck):
            module.mask = mask
