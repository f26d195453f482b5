"""Learning without Forgetting: the frozen base's answers as soft targets (Li and Hoiem, arXiv 1606.09282).

``T^2 KL(p_base || p)`` of the distributions at temperature T, at the positions of trained tokens; the factor keeps its
gradient at the size of the loss's (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ktmerge.tuners.collate import TAUGHT as TAUGHT
from ktmerge.tuners.loss import for_model


class Teacher:
    """The base as it was when this was made; frozen parameters are shared with the model that is trained.

    Args:
        model: before training.
        weight: of the divergence in the loss.
        temperature: T.
        lean: whether the model takes ``logits_to_keep`` as a mask.
    """

    def __init__(self, model: torch.nn.Module, weight: float, temperature: float, *, lean: bool) -> None:
        shared: dict[int, Any] = {id(one): one for one in model.parameters() if not one.requires_grad}
        self._base: Any = copy.deepcopy(model, shared).eval()
        self._base.requires_grad_(False)
        self._weight, self._temperature, self._lean = weight, temperature, lean

    def loss(self, inputs: Mapping[str, Tensor], logits: Tensor, wanted: Tensor) -> Tensor:
        """The weighted divergence, summed over the taught tokens.

        Args:
            inputs: a batch, with `TAUGHT`.
            logits: of the model at the wanted positions, ``[wanted, vocabulary]``.
            wanted: bool ``[samples, tokens]``, positions before a trained token.
        """
        rows = inputs[TAUGHT].unsqueeze(1).expand_as(wanted)
        taught = rows[wanted]
        if not bool(taught.any()):
            return logits.sum() * 0.0
        with torch.no_grad():
            targets = self._logits(inputs, wanted & rows)
        return self._weight * divergence(targets, logits[taught], self._temperature)

    def _logits(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        given = for_model(inputs)
        if self._lean:
            found: Tensor = self._base(**given, logits_to_keep=positions, use_cache=False).logits
            return found
        every: Tensor = self._base(**given, use_cache=False).logits
        return every[positions]


def divergence(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(targets / T) || softmax(logits / T))``, summed over the rows, fp32."""
    before = functional.log_softmax(targets.float() / temperature, -1)
    now = functional.log_softmax(logits.float() / temperature, -1)
    return temperature**2 * functional.kl_div(now, before, reduction="sum", log_target=True)
