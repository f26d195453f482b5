"""What a fine-tune would train on: the first samples, token by token, without loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.images import Image
from ktmerge.recipes.rows import listing
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoded, Encoder, SampleError
from ktmerge.tuners.images.check import Seen
from ktmerge.tuners.images.opening import open_encoder
from ktmerge.tuners.material import longest_allowed


@dataclass(frozen=True)
class PreviewSample:
    """One sample as the model sees it.

    Attributes:
        tokens: the text of each token, and whether it is trained. The texts joined give the whole; of tokens that are
            one image, or a piece of one, the first says how many there are.
        where: file and row.
        images: what the sample shows: names and sizes.
        dropped: it is longer than ``max_length``, or than the model reads, and would be left out.
    """

    tokens: list[tuple[str, bool]]
    where: str
    dropped: bool
    images: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "where": self.where,
            "tokens": [{"text": text, "trained": trained} for text, trained in self.tokens],
            "images": list(self.images),
            "dropped": self.dropped,
        }


def preview(job: FinetuneJob, base: Path, n: int, folder: Path) -> list[PreviewSample]:
    """The first ``n`` samples of ``job.data`` (relative to ``folder``) for the model in ``base``.

    Raises:
        UsageError: the data are wrong, or do not fit the model.
    """
    images = None if job.image_root is None else folder / job.image_root
    samples = read_data(job.data, folder, job.format, images).samples[:n]
    checkpoint = Checkpoint.open(base)
    longest = longest_allowed(job, checkpoint)
    encoder, seen = open_encoder(checkpoint, samples)
    encoder.require_template(samples)
    shown: list[PreviewSample] = []
    problems: list[str] = []
    for sample in samples:
        try:
            encoded = encoder.encode(sample)
        except SampleError as error:
            problems.append(f"{sample.where}: {error}")
            continue
        named = tuple(_named(image, seen) for image in sample.images)
        shown.append(PreviewSample(_texts(encoder, encoded), sample.where, len(encoded) > longest, named))
    if problems:
        raise UsageError(listing(problems))
    return shown


def _named(image: Image, seen: Seen) -> str:
    width, height = seen.sizes[image]
    return f"{'embedded' if image.path is None else image.path.name} ({width} x {height})"


def _texts(encoder: Encoder, encoded: Encoded) -> list[tuple[str, bool]]:
    """The text each token adds. A character made of several tokens is shown with the last of them."""
    texts: list[tuple[str, bool]] = []
    for is_image, pairs in groupby(
        zip(encoded.ids, encoded.trained, strict=True), lambda pair: pair[0] == encoder.image_token
    ):
        run = list(pairs)
        if is_image:
            token = encoder.tokenizer.decode([run[0][0]])
            texts += [(f"{token}×{len(run)}" if len(run) > 1 else token, False), *[("", False)] * (len(run) - 1)]
        else:
            texts += _characters(encoder.tokenizer, run)
    return texts


def _characters(tokenizer: Any, run: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    texts: list[tuple[str, bool]] = []
    pending: list[int] = []
    for token, trained in run:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and len(pending) < 4
        texts.append(("" if unfinished else text, bool(trained)))
        if not unfinished:
            pending = []
    return texts
