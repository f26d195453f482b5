"""Adapters that begin at singular directions of the weights, so that the weights below them change: how, and back.

PiSSA (arXiv 2404.02948), MiLoRA (arXiv 2406.09044), OLoRA (arXiv 2406.01775) and CorDA (arXiv 2406.05223) set
``A0, B0`` from W and train ``W - s B0 A0 + s B A``. What they trained is ``s (B A - B0 A0)``, a change of the true W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ktmerge.recipes.adapters import Adapter
from ktmerge.tuners.collate import Collator
from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.origins import Origins

ADAPTER = "default"
"""PEFT's name of the only adapter there is."""


class Start:
    """What the adapted weights were, and the factors that the adapter began with.

    Args:
        weights: of the modules to adapt, before PEFT sees them, by module.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = Origins(weights)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(self, layers: Mapping[str, Any]) -> None:
        """Take down ``A0, B0`` of PEFT's layers, by module."""
        for name, layer in layers.items():
            first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            self.factors[name] = (first.detach().clone(), second.detach().clone())

    def restore(self, name: str, layer: Any) -> None:
        """Give a layer in float64 the weight from which its merge makes ``W + s (B A - B0 A0)``."""
        factors = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        trained = [one.detach().clone() for one in factors]
        with torch.no_grad():
            for one, began in zip(factors, self.factors[name], strict=True):
                one.copy_(began)
            began_at = layer.get_delta_weight(ADAPTER)
            for one, now in zip(factors, trained, strict=True):
                one.copy_(now)
            weight = layer.get_base_layer().weight
            weight.copy_(self._weights[name].to(weight) - began_at)


def start_at_minor_components(layers: Mapping[str, Any]) -> None:
    """MiLoRA, eq. 3 to 5: A and B from the smallest singular values, ``W - s B A`` below them."""
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        rank, scale = layer.r[ADAPTER], layer.scaling[ADAPTER]
        with torch.no_grad():
            matrix = weight.T if layer.fan_in_fan_out else weight
            left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
            root = (values[-rank:] / scale).sqrt()
            layer.lora_A[ADAPTER].weight.copy_(root[:, None] * right[-rank:])
            layer.lora_B[ADAPTER].weight.copy_(left[:, -rank:] * root)
            weight.sub_(layer.get_delta_weight(ADAPTER).to(weight))


def keep_directions_of(
    samples: Iterable[Encoded], model: Any, config: Any, adapter: Adapter, collator: Collator, seed: int
) -> None:
    """CorDA's pass over upstream samples: the covariance of the inputs of every map, for its knowledge-preserving mode.

    Args:
        samples: upstream.
        model: not adapted yet; its maps get what PEFT reads when it adapts them.
        config: PEFT's, with the maps.
        adapter: says how many samples to draw.
        collator: makes a batch of a sample.
        seed: of the draw.
    """
    from peft.tuners.lora.corda import preprocess_corda

    there = list(samples)
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))[: adapter.samples].tolist()

    def run() -> None:
        for place in order:  # one by one: padding would count as input
            inputs = {name: value.to(model.device) for name, value in collator([there[place]]).items()}
            model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)

    preprocess_corda(model, config, run_model=run)
