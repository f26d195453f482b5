"""Prompt tuning on the visual tokens that the connector emits: n learned vectors, spread over the tokens of an image.

Token k of N becomes ``v_k + P[floor(k n / N)]``: one vector for all of them, one for each stretch of them, or one for
each. The vectors start at zero, so that nothing changes.

Imports torch; import it only where it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ktmerge.errors import UsageError

NAME = "visual_prompt"
"""Of the module inside the connector."""


class VisualPrompt(nn.Module):
    """The vectors P ``[count, size]``."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(count, size))

    def forward(self, tokens: Tensor) -> Tensor:
        """``[images, N, size]`` to the same; with one vector also ``[N, size]``.

        Raises:
            UsageError: tokens of several images come as one row, and there is more than one vector.
        """
        count = len(self.prompt)
        if count > 1 and tokens.dim() < 3:
            raise UsageError("visual-prompt: this connector emits all images' tokens in one row; use tokens: 1.")
        total = tokens.shape[-2]
        places = torch.arange(total, device=tokens.device) * count // total
        return tokens + self.prompt[places].to(tokens.dtype)


def attach_visual_prompt(model: Any, place: str, size: int, count: int) -> None:
    """Have the vectors of ``size`` that the module ``place`` of a model emits pass a prompt of ``count`` vectors."""
    connector = model.get_submodule(place)
    weight = next(connector.parameters())
    connector.add_module(NAME, VisualPrompt(size, count).to(weight.device, weight.dtype))
    connector.register_forward_hook(_behind)


def _behind(connector: Any, inputs: Any, outputs: Any) -> Any:
    if not isinstance(outputs, Tensor):
        raise UsageError(f"visual-prompt: the connector emits no tokens but a {type(outputs).__name__}.")
    return getattr(connector, NAME)(outputs)
