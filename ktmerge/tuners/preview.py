"""What a fine-tune would train on: the first samples, token by token, without loading the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.recipes.rows import listing
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoded, Encoder, SampleError


@dataclass(frozen=True)
class PreviewSample:
    """One sample as the model sees it.

    Attributes:
        tokens: the text of each token, and whether it is trained. The texts joined give the whole.
        where: file and row.
        dropped: it is longer than ``max_length`` and would be left out.
    """

    tokens: list[tuple[str, bool]]
    where: str
    dropped: bool


def preview(job: FinetuneJob, base: Path, n: int, folder: Path) -> list[PreviewSample]:
    """The first ``n`` samples of ``job.data`` (relative to ``folder``) for the model in ``base``.

    Raises:
        UsageError: the data are wrong, or do not fit the model.
    """
    data = read_data(job.data, folder, job.format)
    encoder = Encoder.load(base)
    encoder.require_template(data.samples)
    shown: list[PreviewSample] = []
    problems: list[str] = []
    for sample in data.samples[:n]:
        try:
            encoded = encoder.encode(sample)
        except SampleError as error:
            problems.append(f"{sample.where}: {error}")
            continue
        texts = _texts(encoder.tokenizer, encoded)
        shown.append(PreviewSample(texts, sample.where, len(encoded) > job.max_length))
    if problems:
        raise UsageError(listing(problems))
    return shown


def _texts(tokenizer: Any, encoded: Encoded) -> list[tuple[str, bool]]:
    """The text each token adds. A character made of several tokens is shown with the last of them."""
    texts: list[tuple[str, bool]] = []
    pending: list[int] = []
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and len(pending) < 4
        texts.append(("" if unfinished else text, bool(trained)))
        if not unfinished:
            pending = []
    return texts
