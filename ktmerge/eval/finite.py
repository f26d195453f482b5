"""What is said where a model's logits are not numbers. Knows no model."""

from __future__ import annotations

from ktmerge.errors import KtmergeError


class NotFiniteError(KtmergeError):
    """A model gave NaN or infinite logits.

    Attributes:
        number: of the request, prompt or text, from 0, in the order they were given.
    """

    def __init__(self, number: int) -> None:
        super().__init__("the model's logits are not finite numbers; its weights are broken.")
        self.number = number
