"""What a model is measured on: rows of the data drawn by the seed, with their images, or texts of its own making."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints import Checkpoint
from ktmerge.checkpoints.limits import context_length
from ktmerge.errors import UsageError
from ktmerge.progress import Progress
from ktmerge.recipes.rows import listing, read_rows
from ktmerge.recipes.schema import Statistics
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoded, Encoder, encode_all

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
    """

    makers: Sequence[Callable[[], Example]]
    source: Mapping[str, Any] = field(default_factory=dict)

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
    data = read_data(job.data, folder, job.format)
    pictures = _pictures(job, folder)
    chosen = _draw(len(data.samples), job.samples, job.seed)
    encoder = Encoder.load(checkpoint.root)
    longest = min(job.max_length, context_length(checkpoint.config) or job.max_length)
    samples = [data.samples[number] for number in chosen]
    source: dict[str, Any] = {"data": list(data.digests)}
    if any(pictures.get(sample.where) for sample in samples):
        from ktmerge.tuners.statistics.pictures import Pictures

        seeing = Pictures(checkpoint, encoder, longest)
        found = seeing.encode(samples, pictures, progress)
        source["images"] = _digest(path for sample in samples for path in pictures.get(sample.where, ()))
        return Examples(found, source)
    encoder.require_template(samples)
    encoded = encode_all(encoder, samples, longest, progress, ", ".join(job.data))
    if encoded.dropped:
        progress.note(f"{encoded.dropped} of {len(samples)} samples are longer than {longest} tokens and left out.")
    return Examples([_maker(one) for one in encoded.samples], source)


def text_example(encoded: Encoded) -> Example:
    """An encoded text as the only one of its batch."""
    import torch

    ids = torch.tensor(encoded.ids, dtype=torch.int64)[None]
    answers = torch.tensor(list(encoded.trained), dtype=torch.bool)
    answers[:1] = False
    return Example({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, answers)


def _maker(encoded: Encoded) -> Callable[[], Example]:
    return lambda: text_example(encoded)


def _draw(there: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` numbers below ``there``, in order."""
    from ktmerge.tuners.statistics.reservoir import priorities

    chances = priorities(seed, "rows", 0, 0, there)
    return sorted(int(number) for number in chances.argsort(kind="stable")[:wanted])


def _pictures(job: Statistics, folder: Path) -> dict[str, list[Path]]:
    """The images that rows name in a column ``images`` or ``image``, by where the row is."""
    root = folder / job.images if job.images is not None else None
    found: dict[str, list[Path]] = {}
    problems: list[str] = []
    for file in job.data:
        for row in read_rows(folder / file, file).rows:
            named = row.values.get("images") or row.values.get("image")
            if not named:
                continue
            names = named if isinstance(named, list) else [named]
            if not all(isinstance(name, str) for name in names):
                problems.append(f"{row.where}: images are named by their files.")
                continue
            paths = [(root or (folder / file).parent) / name for name in names]
            missing = [path for path in paths if not path.is_file()]
            problems += [f"{row.where}: {path}: no such image." for path in missing]
            found[row.where] = paths
    if problems:
        raise UsageError(listing(problems))
    if job.images is not None and not found:
        raise UsageError(f"--images {job.images}: no row of the data names an image (column images or image).")
    return found


def _digest(paths: Any) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
