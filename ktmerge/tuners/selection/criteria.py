"""Scores: how much an element of a weight is to be trained, from its pre-trained value and its gradients.

Imports torch; import it only where it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ktmerge.tuners.keys import keyed
from ktmerge.tuners.sharding import own


def standing(values: Tensor) -> Tensor:
    """``sigmoid(z(|x|))``, z standardised over the tensor: how a magnitude stands among its tensor's; 0 if all are 0.

    SPIDER's score (arXiv 2411.10928). A tensor of equal magnitudes has no standings: 0.5.
    """
    magnitudes = values.abs()
    if not bool(magnitudes.any()):
        return torch.zeros_like(magnitudes)
    spread = magnitudes.std(correction=0)
    if float(spread) == 0.0:
        return torch.full_like(magnitudes, 0.5)
    return torch.sigmoid((magnitudes - magnitudes.mean()) / spread)


def fusion(pretrained: Tensor, gradients: Tensor) -> Tensor:
    """``s(g) / (s(w0) + s(g))``, s the standings of gradients and pre-trained weights: above 1/2 where g's is higher.

    Args:
        pretrained: w0.
        gradients: the sum of all gradients so far, of the same shape.
    """
    own, needed = standing(pretrained), standing(gradients)
    together = own + needed
    return torch.where(together > 0, needed / together, 0.0)


def shares(scores: Tensor, mask: Tensor) -> Tensor:
    """The soft mask: scores in (0, 1) over their mean within ``mask``, at most 1; 0 outside.

    SPIDER's normalisation: an element of average importance or more moves freely.
    """
    inside = scores[mask]
    average = inside.mean() if inside.numel() else scores.new_ones(())
    return torch.where(mask, (scores / average).clamp(max=1.0), 0.0)


def coins(shape: torch.Size, seed: int, name: str, round_: int) -> Tensor:
    """Uniform fp32 in [0, 1), the same for the same seed, tensor and round."""
    generator = torch.Generator().manual_seed(keyed(seed, "coins", name, str(round_)))
    return torch.rand(shape, generator=generator)


def noise(size: int, seed: int, name: str, round_: int) -> Tensor:
    """What decides between equal scores: int32, ``[size]``."""
    generator = torch.Generator().manual_seed(keyed(seed, "noise", name, str(round_)))
    return torch.randint(-(1 << 31), 1 << 31, (size,), generator=generator, dtype=torch.int32)


class Evidence:
    """What gradients have said since it was last emptied: their sum, or the sum of their squares.

    Args:
        parameters: whose gradients are observed; of those that are sharded, `totals` are of the process's own rows.
        squared: squares (the empirical Fisher information, up to a factor) instead of the plain sum.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, squared: bool) -> None:
        self._parameters = parameters
        self._squared = squared
        self.totals = {name: torch.zeros_like(own(parameter)) for name, parameter in parameters.items()}

    def observe(self) -> None:
        """Take the gradients that there are, of a whole step, before anything is done to them."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            gradient = own(parameter.grad)
            if self._squared:
                self.totals[name].addcmul_(gradient, gradient)
            else:
                self.totals[name].add_(gradient)

    def clear(self) -> None:
        """Forget them."""
        for total in self.totals.values():
            total.zero_()
