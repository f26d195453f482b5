"""What the scales of a model's norms multiply: mean squares over all tokens, element by element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_CHANNELS_FIRST = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.GroupNorm,
    nn.PReLU,
)


class Scales:
    """Hooks on norms that sum up the squares of what their weights multiply, fp64.

    A norm's output is linear in its weight, y = x * w + b or x * (1 + w) + b with x the normalised input (and whatever
    else it is gated by), so that x is the difference of the outputs for a weight of ones and one of zeros: whichever
    way the norm is written.

    Args:
        model: the model; `close` takes the hooks off again.
        names: tensor name in the checkpoint of every weight that may be a norm's, by its name in the model.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._probing = False
        self._handles = [
            module.register_forward_hook(partial(self._hook, tensor), with_kwargs=True)
            for tensor, module in _norms(model, names)
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def tokens(self) -> dict[str, int]:
        """How many vectors went through each norm, by its weight's name in the checkpoint."""
        return dict(sorted(self._counts.items()))

    def mean_square(self, tensor: str) -> Tensor:
        """E x^2 of what a weight multiplies, fp32, shaped like it."""
        return (self._sums[tensor] / self._counts[tensor]).float()

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from."""
        counts = {f"{name}|count": torch.tensor(count) for name, count in self._counts.items()}
        return {**{f"{name}|sum": values for name, values in self._sums.items()}, **counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        for key, values in state.items():
            name, _, what = key.rpartition("|")
            if what == "sum":
                self._sums[name] = values.clone()
            else:
                self._counts[name] = int(values)

    def _hook(self, tensor: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._probing:
            return
        weight = module.get_parameter("weight")
        if not isinstance(output, Tensor) or output.shape[-1:] != weight.shape or not output.numel():
            return
        self._probing = True
        try:
            with torch.no_grad():
                ones, zeros = (
                    functional_call(module, {"weight": one(weight)}, args, kwargs)
                    for one in (torch.ones_like, torch.zeros_like)
                )
        finally:
            self._probing = False
        scaled = (ones - zeros).reshape(-1, len(weight))
        square = scaled.square().sum(0, dtype=torch.float64).cpu()
        self._sums[tensor] = self._sums[tensor] + square if tensor in self._sums else square
        self._counts[tensor] = self._counts.get(tensor, 0) + len(scaled)


def _norms(model: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """Weight's name in the checkpoint and the module, of all that have one weight, a vector, and at most a bias."""
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        own = {key for key, _ in module.named_parameters()}
        if name not in names or not {"weight"} <= own <= {"weight", "bias"} or isinstance(module, _CHANNELS_FIRST):
            continue
        if module.get_parameter("weight").dim() == 1:
            yield names[name], module
