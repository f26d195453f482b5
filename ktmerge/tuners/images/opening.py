"""The encoder that fits a model and its data: with images or without."""

from __future__ import annotations

from collections.abc import Sequence

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.tuners.data import Sample
from ktmerge.tuners.encode import Encoder
from ktmerge.tuners.images.check import Seen, has_images, look_at


def open_encoder(base: Checkpoint, samples: Sequence[Sample], progress: Progress = SILENT) -> tuple[Encoder, Seen]:
    """For all samples that will come; their images are read once, and what is known of them is returned, too.

    Raises:
        UsageError: images that cannot be read or that the model cannot see, or no tokenizer or processor.
    """
    first = next((sample for sample in samples if sample.images), None)
    if not sees(base):
        if first is not None:
            kind = base.config.get("model_type", "unknown")
            raise UsageError(f"{first.where}: has an image, but {base.root} (a '{kind}' model) takes text alone.")
        return Encoder.load(base.root), Seen()
    from ktmerge.tuners.images.encode import SeeingEncoder

    seen = look_at(samples, progress)
    try:
        return SeeingEncoder.open(base.root, seen), seen
    except UsageError:
        if has_images(samples):
            raise
        return Encoder.load(base.root), seen


def sees(base: Checkpoint) -> bool:
    """Whether a model takes images beside text."""
    return "vision_config" in base.config
