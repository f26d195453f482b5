"""What is added to the loss of an adapter: orthogonality to directions of the base, LoRASculpt's, AdaLoRA's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ktmerge.recipes.adapters import Adapter
from ktmerge.tuners.adapters.starts import ADAPTER
from ktmerge.tuners.keys import keyed

_OMEGA, _EPSILON = 1.0, 1e-15
"""As the authors' code of LoRASculpt has them."""
_MORE, _ROUNDS = 8, 8
"""Directions beyond those asked for, and power iterations, when the largest singular directions are looked for."""


class Penalty:
    """Adds the gradient of a penalty to that of the loss, before it is clipped.

    Args:
        value: computes it from the trained parameters.
    """

    def __init__(self, value: Callable[[], Tensor]) -> None:
        self._value = value
        self.penalty = 0.0

    def add_gradients(self) -> None:
        """Before a step; `penalty` is what that is the gradient of."""
        with torch.enable_grad():
            value = self._value()
        torch.autograd.backward(value)
        self.penalty = float(value.detach())


def penalty_of(adapter: Adapter, layers: Mapping[str, Any], peft_model: Any, seed: int) -> Penalty | None:
    """The penalty that an adapter asks for; None if it asks for none.

    Args:
        adapter: what is asked for.
        layers: PEFT's, by module.
        peft_model: of them.
        seed: of random directions.
    """
    if adapter.name == "adalora":
        strength = peft_model.peft_config[ADAPTER].orth_reg_weight
        return Penalty(lambda: strength * unorthogonality(list(layers.values())))
    if adapter.sculpt:
        return Penalty(lambda: adapter.sculpt * sculpted(list(layers.values())))
    if adapter.orthogonal:
        rank = adapter.used_rank
        found = [(layer, _directions(name, layer, adapter.subspace, rank, seed)) for name, layer in layers.items()]
        return Penalty(lambda: adapter.orthogonal * inside(found))
    return None


def inside(layers: list[tuple[Any, tuple[Tensor, Tensor]]]) -> Tensor:
    """``|| U^T B ||^2 + || A V ||^2``, mean over the maps: what of A and B lies in the subspace.

    CLoRA's regulariser (arXiv 2410.16801) for a subspace that is chosen.

    Args:
        layers: PEFT's, each with orthonormal U ``[out, k]`` and V ``[in, k]``.
    """
    terms = []
    for layer, (left, right) in layers:
        first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        terms.append((left.T @ second).square().sum() + (first @ right).square().sum())
    return torch.stack(terms).mean()


def sculpted(layers: list[Any]) -> Tensor:
    """``|| tanh(omega S) * B A ||``, mean over the maps, with ``S = |1 / log(|W| / ||W||)|``: large where W is.

    LoRASculpt (arXiv 2503.16843), its magnitude-aware regularisation.
    """
    terms = []
    for layer in layers:
        with torch.no_grad():
            weight = layer.get_base_layer().weight
            weight = weight.T if layer.fan_in_fan_out else weight
            share = weight.abs() / weight.norm() + _EPSILON
            guard = torch.tanh(_OMEGA * share.log().reciprocal().abs())
        terms.append((guard * (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight)).norm())
    return torch.stack(terms).mean()


def unorthogonality(layers: list[Any]) -> Tensor:
    """AdaLoRA (arXiv 2303.10512, eq. 4): ``|| P^T P - I ||`` and ``|| Q Q^T - I ||``, mean over all factors."""
    terms = []
    for layer in layers:
        for one in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T):
            terms.append((one @ one.T - torch.eye(one.shape[0], device=one.device)).norm())
    return torch.stack(terms).mean()


def _directions(name: str, layer: Any, subspace: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U ``[out, k]`` and V ``[in, k]``: of the largest singular values of W, or random."""
    weight = layer.get_base_layer().weight.detach()
    weight = (weight.T if layer.fan_in_fan_out else weight).float()
    count = min(rank, *weight.shape)
    generator = torch.Generator().manual_seed(keyed(seed, "subspace", name))
    if subspace == "random":
        left, right = (
            torch.linalg.qr(torch.randn(size, count, generator=generator)).Q.to(weight) for size in weight.shape
        )
        return left, right
    sketch = torch.randn(weight.shape[1], min(count + _MORE, *weight.shape), generator=generator).to(weight)
    for _ in range(_ROUNDS):  # subspace iteration (Halko, Martinsson, Tropp; arXiv 0909.4061, algorithm 4.4)
        sketch = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ sketch).Q).Q
    left, _, right = torch.linalg.svd(weight @ sketch, full_matrices=False)
    return left[:, :count].contiguous(), (sketch @ right.T)[:, :count].contiguous()
