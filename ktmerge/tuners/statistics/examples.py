"""What a model is measured on: rows of the data drawn by the seed, with their images, or texts of its own making."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.limits import context_length
from ktmerge.errors import UsageError
from ktmerge.progress import Progress
from ktmerge.recipes.schema import Statistics
from ktmerge.tuners.collate import IGNORED, Collator
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoded, encode_all
from ktmerge.tuners.images.check import has_images
from ktmerge.tuners.images.opening import open_encoder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One example, alone in its batch.

    Attributes:
        keywords: of the model's forward pass; ``input_ids`` ``[1, tokens]`` among them.
        answers: which tokens are the answer's, bool ``[tokens]``; the first of all never counts.
    """

    keywords: Mapping[str, Tensor]
    answers: Tensor


@dataclass(frozen=True)
class Examples:
    """All examples; each is made when it is asked for.

    Attributes:
        source: what decides them, as plain data.
        tokens: sha256 of all of them; empty where the model writes them itself.
    """

    makers: Sequence[Callable[[], Example]]
    source: Mapping[str, Any] = field(default_factory=dict)
    tokens: str = ""

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, number: int) -> Example:
        return self.makers[number]()


def read_examples(job: Statistics, checkpoint: Checkpoint, folder: Path, progress: Progress) -> Examples:
    """The rows of a job's data for one model.

    Args:
        job: with data.
        checkpoint: whose tokenizer and chat template, or processor, are used.
        folder: where the job's relative paths start.
        progress: told what is left out.

    Raises:
        UsageError: wrong data, images that are not there, or nothing that fits the model.
    """
    root = folder / job.images if job.images is not None else None
    data = read_data(job.data, folder, job.format, root)
    if job.images is not None and not has_images(data.samples):
        raise UsageError(f"--images {job.images}: no row of the data names an image (column images or image).")
    samples = [data.samples[number] for number in _draw(len(data.samples), job.samples, job.seed)]
    encoder, seen = open_encoder(checkpoint, samples, progress)
    encoder.require_template(samples)
    longest = min(job.max_length, context_length(checkpoint.config) or job.max_length)
    encoded = encode_all(encoder, samples, longest, progress, ", ".join(job.data))
    if encoded.dropped:
        progress.note(f"{encoded.dropped} of {len(samples)} samples are longer than {longest} tokens and left out.")
    source: dict[str, Any] = {"data": list(data.digests)}
    if has_images(samples):
        source["images"] = seen.digest(samples)
    collate = Collator(0, extras=encoder.extras)
    return Examples([partial(_example, one, collate) for one in encoded.samples], source, encoded.digest)


def text_example(encoded: Encoded) -> Example:
    """An encoded text as the only one of its batch."""
    return _example(encoded, Collator(0))


def _example(encoded: Encoded, collate: Collator) -> Example:
    keywords = collate([encoded])
    answers = keywords.pop("labels")[0] != IGNORED
    answers[:1] = False
    return Example(keywords, answers)


def _draw(there: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` numbers below ``there``, in order."""
    from ktmerge.tuners.statistics.reservoir import priorities

    chances = priorities(seed, "rows", 0, there)
    return sorted(int(number) for number in chances.argsort(kind="stable")[:wanted])
