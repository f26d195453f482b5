"""The weights as they were before training: a lossless copy in the smallest type that holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ktmerge.tuners.sharding import own

_TYPES = (torch.bfloat16, torch.float16)


class Origins:
    """What the parameters were: two bytes each where the base is stored in sixteen bits, else four.

    Args:
        parameters: before the first step, fp32, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._stored = {name: _smallest(own(parameter)) for name, parameter in parameters.items()}

    def __getitem__(self, name: str) -> Tensor:
        """fp32, in the parameter's shape; of a sharded one, its own rows."""
        return self._stored[name].float()

    @property
    def bytes(self) -> int:
        """Memory they take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._stored.values())


def _smallest(values: Tensor) -> Tensor:
    for kind in _TYPES:
        small = values.to(kind)
        if small.float().equal(values):
            return small
    return values.clone()
