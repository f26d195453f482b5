"""From encoded samples to the tensors of one batch: padded on the right to the longest, labels only where trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ktmerge.tuners.encode import Encoded, Extras

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a token that does not enter the loss."""
TAUGHT = "taught"
"""Key of a batch: bool ``[samples]``, whose answers the base is distilled on."""


class Collator:
    """Makes ``input_ids``, ``attention_mask`` and ``labels``, each ``[samples, tokens]`` int64.

    Args:
        pad: the token to fill up with; it is masked everywhere, so any will do.
        taught: which samples the base is to be distilled on; they are marked as ``taught``, bool ``[samples]``.
        extras: what makes further tensors, of models that see.
    """

    def __init__(self, pad: int, taught: Callable[[Encoded], bool] | None = None, extras: Extras | None = None) -> None:
        self._pad = pad
        self._taught = taught
        self._extras = extras

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        import torch

        shape = (len(samples), max(map(len, samples)))
        ids = torch.full(shape, self._pad)
        mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for row, sample in enumerate(samples):
            own = torch.tensor(sample.ids, dtype=torch.int64)
            trained = torch.tensor(list(sample.trained), dtype=torch.bool)
            ids[row, : len(sample)] = own
            mask[row, : len(sample)] = 1
            labels[row, : len(sample)] = torch.where(trained, own, IGNORED)
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._taught is not None:
            found[TAUGHT] = torch.tensor([self._taught(sample) for sample in samples])
        if self._extras is not None:
            found |= self._extras(samples, shape[1])
        return found
