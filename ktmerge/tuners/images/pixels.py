"""What a model that sees is given beside tokens: pixels, and which token is what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ktmerge.errors import KtmergeError
from ktmerge.recipes.images import Image, ImageError
from ktmerge.tuners.encode import Encoded

if TYPE_CHECKING:
    from torch import Tensor

_OF_TOKENS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"})
_KINDS = ("mm_token_type_ids", "token_type_ids")


class Pixels:
    """Makes the tensors of a batch that its images are, as the processor makes those of each sample alone.

    Those of several samples are put one after the other, smaller ones filled up with zeros, which is what processors do
    with a batch. Samples without images add nothing.

    Args:
        processor: of transformers.
        prefixed: whether tokens up to the answer see each other in both directions, and are told by their type.
    """

    def __init__(self, processor: Any, *, prefixed: bool = False) -> None:
        self._processor = processor
        self._prefixed = prefixed
        self._kind: str | None = "token_type_ids" if prefixed else None
        self._knows_kind = prefixed

    def __call__(self, samples: Sequence[Encoded], length: int) -> dict[str, Tensor]:
        found = [self._pixels(sample.images) for sample in samples if sample.images]
        names = dict.fromkeys(name for one in found for name in one)
        batch = {name: _stacked([one[name] for one in found if name in one]) for name in names}
        kind = self._kind_of_tokens()
        if kind is not None:
            batch[kind] = self._kinds(samples, length)
        return batch

    def _pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """What the processor makes of one sample's images; raises KtmergeError where they can no longer be read."""
        token = self._processor.image_token
        try:
            opened = [image.open() for image in images]
            found = self._processor(text=[token * len(images)], images=[opened], return_tensors="pt")
        except ImageError as error:
            raise KtmergeError(f"an image could be read before, and now cannot: {error}") from None
        return {name: value for name, value in found.items() if name not in _OF_TOKENS}

    def _kind_of_tokens(self) -> str | None:
        """The name under which this model is told which tokens are of images; None if it is not told."""
        if not self._knows_kind:
            from PIL import Image as Pictures

            blank = Pictures.new("RGB", (64, 64))
            found = self._processor(text=[self._processor.image_token], images=[[blank]])
            # tokenizers have types of their own, which are all 0 in one text
            self._kind = next((name for name in _KINDS if any(found.get(name, [[]])[0])), None)
            self._knows_kind = True
        return self._kind

    def _kinds(self, samples: Sequence[Encoded], length: int) -> Tensor:
        import torch

        kinds = torch.zeros(len(samples), length, dtype=torch.int64)
        for row, sample in enumerate(samples):
            if self._prefixed:
                answer = sample.trained.find(1)
                kinds[row, answer if answer >= 0 else len(sample) : len(sample)] = 1
            else:
                kinds[row, : len(sample)] = torch.tensor(
                    self._processor.create_mm_token_type_ids([list(sample.ids)])[0]
                )
        return kinds


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other along their first dimension, filled up with zeros along the others."""
    import torch

    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    if all(list(tensor.shape[1:]) == shape for tensor in tensors):
        return torch.cat(list(tensors))
    whole = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *shape)
    start = 0
    for tensor in tensors:
        whole[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        start += len(tensor)
    return whole
