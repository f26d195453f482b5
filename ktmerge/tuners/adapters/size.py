"""How large an adapter is, from the shapes of what it is attached to. Loads neither torch nor peft."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktmerge.recipes.adapters import MOVING, Adapter

SCALED = ("k_proj", "v_proj", "key", "value", "query_key_value", "c_attn", "qkv_proj", "wqkv")
SCALED_INSIDE = ("down_proj", "fc2", "dense_4h_to_h", "w2", "wo")
"""What IA3 (arXiv 2205.05638) scales: keys, values, and the inputs of the second map of the feed-forward."""
_PAIRS = ("lora", "rslora", "lora+", "dora", *MOVING)
_DENSE = {"fourierft": 1, "shira": 1, "boft": 2}
"""Numbers of the size of a map that a forward pass makes anew and keeps: the change, or the map as it is now."""


@dataclass(frozen=True)
class AdapterSize:
    """What an adapter adds to a fine-tune.

    Attributes:
        trained: parameters that move.
        beside: bytes kept that do not: random matrices, what the adapted weights were, directions to keep away from.
        dense: bytes of matrices that a forward pass makes and the backward pass needs.
        inner: numbers kept for each token, over all layers.
    """

    trained: int = 0
    beside: float = 0.0
    dense: float = 0.0
    inner: float = 0.0


@dataclass(frozen=True)
class Shapes:
    """What an adapter may be attached to.

    Attributes:
        maps: ``(outputs, inputs)`` of the linear maps that are named, by name.
        layers: of the language model that are named.
        section: of the configuration that describes it.
        stored: bytes of a number in the base's files.
    """

    maps: Mapping[str, tuple[int, int]]
    layers: int
    section: Mapping[str, Any]
    stored: int

    @property
    def hidden(self) -> int:
        """Width of the language model."""
        return int(
            next((self.section[key] for key in ("hidden_size", "n_embd", "d_model") if self.section.get(key)), 0)
        )

    @property
    def pairs(self) -> int:
        """Numbers of one token's keys and values in all layers."""
        heads = int(self.section.get("num_attention_heads") or self.section.get("n_head") or 1)
        width = int(self.section.get("head_dim") or self.hidden // heads)
        kept = int(self.section.get("num_key_value_heads") or heads)
        count = int(self.section.get("num_hidden_layers") or self.section.get("n_layer") or self.layers)
        return 2 * count * kept * width


def size_of(adapter: Adapter, shapes: Shapes) -> AdapterSize:
    """The size of an adapter; of X-LoRA that of its router, without the experts, which are files of their own.

    Args:
        adapter: what is asked for.
        shapes: of what it is attached to.
    """
    if adapter.name in ("prompt", "p-tuning", "prefix", "visual-prompt", "xlora"):
        return _before(adapter, shapes)
    if adapter.name in ("bottleneck", "conditioned", "llama-adapter"):
        return _behind(adapter, shapes)
    return _inside(adapter, shapes)


def _before(adapter: Adapter, shapes: Shapes) -> AdapterSize:
    tokens, hidden = adapter.used_tokens, shapes.hidden
    if adapter.name == "prefix":
        return AdapterSize(tokens * shapes.pairs)
    if adapter.name == "p-tuning":
        return AdapterSize(tokens * hidden + 3 * hidden * (hidden + 1))
    if adapter.name == "xlora":
        return AdapterSize(len(adapter.experts) * (hidden + 1))
    return AdapterSize(tokens * hidden)


def _behind(adapter: Adapter, shapes: Shapes) -> AdapterSize:
    hidden, layers = shapes.hidden, shapes.layers
    if adapter.name == "llama-adapter":
        return AdapterSize(layers * (adapter.used_tokens * hidden + 1), inner=layers * 2 * hidden)
    width = adapter.used_rank
    if adapter.name == "bottleneck":
        return AdapterSize(layers * (2 * hidden * width + width + hidden), inner=layers * 2 * width)
    inner = layers * (4 * width + 2 * hidden)
    return AdapterSize(layers * (3 * hidden * width + width + hidden), inner=inner)


def _inside(adapter: Adapter, shapes: Shapes) -> AdapterSize:
    """Of families that adapt linear maps, one by one."""
    sizes = [_of_map(adapter, name.rpartition(".")[2], *shape, shapes.stored) for name, shape in shapes.maps.items()]
    beside = sum(one.beside for one in sizes)
    if adapter.name == "vera" and shapes.maps:
        widest = max(inputs for _, inputs in shapes.maps.values()) + max(outputs for outputs, _ in shapes.maps.values())
        beside += 4.0 * adapter.used_rank * widest
    return AdapterSize(
        sum(one.trained for one in sizes), beside, sum(one.dense for one in sizes), sum(one.inner for one in sizes)
    )


def _of_map(adapter: Adapter, leaf: str, outputs: int, inputs: int, stored: int) -> AdapterSize:
    rank, both, area = adapter.used_rank, outputs + inputs, outputs * inputs
    dense = 4.0 * area * _DENSE.get(adapter.name, 0)
    if adapter.name in _PAIRS:
        length = outputs if adapter.name == "dora" else 0
        beside = float(stored * area + 4 * rank * both) if adapter.name in MOVING else 0.0
        beside += 4.0 * rank * both if adapter.orthogonal else 0.0
        dense += 12.0 * area if adapter.sculpt else 0.0
        return AdapterSize(rank * both + length, beside, dense, rank + 2 * length + (inputs if adapter.dropout else 0))
    if adapter.name == "adalora":
        rank = math.ceil(1.5 * rank)
        trained = rank * (both + 1)
        return AdapterSize(trained, beside=12.0 * trained, inner=2 * rank)  # the sensitivities of each
    if adapter.name == "vera":
        return AdapterSize(rank + outputs, inner=2 * rank + outputs)
    if adapter.name == "ia3":
        inside = leaf in SCALED_INSIDE
        return AdapterSize(inputs if inside else outputs, inner=0 if inside else outputs)
    if adapter.name == "oft":
        return AdapterSize(inputs * (adapter.block - 1) // 2, inner=inputs)
    if adapter.name == "boft":
        return AdapterSize(inputs * adapter.block + outputs, beside=4.0 * inputs**2, dense=dense + 8.0 * inputs**2)
    if adapter.name == "shira":
        return AdapterSize(rank * both, beside=16.0 * rank * both, dense=dense)
    return AdapterSize(adapter.coefficients, beside=16.0 * adapter.coefficients, dense=dense)
