"""Whether a model can be trained on samples with images as they were encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ktmerge.errors import UsageError, first_line
from ktmerge.tuners.collate import Collator
from ktmerge.tuners.encode import Encoded, EncodedSet, Encoder
from ktmerge.tuners.mode import evaluating


def shows_images(sets: Iterable[EncodedSet]) -> bool:
    """Whether any sample has an image."""
    return any(sample.images for found in sets for sample in found.samples)


def require_alike(sets: Mapping[str, EncodedSet]) -> None:
    """Refuse, where several processes share a model, that some batches of a set need its vision tower and others don't.

    Raises:
        UsageError: some samples have images, and some don't.
    """
    together: dict[str, list[Encoded]] = {}
    for name, found in sets.items():
        together.setdefault("train" if name == "replay" else name, []).extend(found.samples)
    for name, samples in together.items():
        seeing = sum(bool(sample.images) for sample in samples)
        if 0 < seeing < len(samples):
            raise UsageError(
                f"{seeing} of {len(samples)} samples ({name}) have images. Several processes work through every part "
                "of the model together, so that all must have images or none; use one process, or make two runs."
            )


def require_agreement(model: Any, encoder: Encoder, samples: Sequence[Encoded]) -> None:
    """Try the samples with the fewest and the most tokens: the model must make one feature for each token of an image.

    Raises:
        UsageError: it makes more or fewer, so that processor and weights are not of one model.
    """
    import torch

    seeing = sorted((sample for sample in samples if sample.images), key=len)
    collate = Collator(0, extras=encoder.extras)
    try:
        with evaluating(model), torch.no_grad():
            for sample in [*seeing[:1], *seeing[1:][-1:]]:
                batch = {name: value.to(model.device) for name, value in collate([sample]).items() if name != "labels"}
                model(**batch, use_cache=False)
    except (ValueError, IndexError) as error:
        raise UsageError(
            "the processor writes other tokens for an image than the model makes features of it; it is not the "
            f"model's own: {first_line(error)}"
        ) from None
