"""A trained adapter becomes dense weights: in float64, rounded once, and held to the logits that it was trained at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ktmerge.errors import KtmergeError
from ktmerge.tuners.adapters.attach import Adapted

TOLERANCE = 1e-4
"""How far a logit of the folded model may be from the adapted one's, as a share of the largest logit (or of 1)."""


def fold(adapted: Adapted, logits: Callable[[Any], Tensor]) -> tuple[dict[str, Tensor], float]:
    """Fold the adapter; the model is a plain one afterwards.

    Args:
        adapted: trained; its family folds.
        logits: what a model says to a sample, fp32.

    Returns:
        the tensors that changed, fp32, under the names of the plain model's parameters, and the largest difference of
        a logit.

    Raises:
        KtmergeError: the folded model says something else than the adapted one.
    """
    adapted.model.eval()
    before = logits(adapted.model)
    for name, layer in adapted.layers.items():
        layer.to(torch.float64)
        if adapted.start is not None:
            adapted.start.restore(name, layer)
        layer.merge()
        layer.get_base_layer().to(torch.float32)
    plain = adapted.peft.base_model.unload()
    far = float((logits(plain) - before).abs().max())
    limit = TOLERANCE * max(1.0, float(before.abs().max()))
    if not far <= limit:
        raise KtmergeError(
            f"adapter {adapted.adapter.name}: folded into the weights, logits are off by {far:.2g}, more than the "
            f"{limit:.2g} that rounding explains; nothing was saved."
        )
    leaves = ("weight", "bias") if adapted.adapter.name == "ia3" else ("weight",)
    own = dict(plain.named_parameters())
    named = [f"{module}.{leaf}" for module in adapted.layers for leaf in leaves]
    return {name: own[name].detach() for name in named if name in own}, far
