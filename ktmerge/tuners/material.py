"""What a fine-tune works on: the base and all data, read, checked and encoded before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.limits import context_length
from ktmerge.checkpoints.statistics import Statistics
from ktmerge.errors import UsageError, collected, refuse
from ktmerge.progress import Progress
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.data import DataSet, read_data
from ktmerge.tuners.encode import EncodedSet, Encoder, encode_all
from ktmerge.tuners.images.check import Seen
from ktmerge.tuners.images.opening import open_encoder
from ktmerge.tuners.optimizers import require_optimizer
from ktmerge.tuners.report import inputs_of
from ktmerge.tuners.trained import require_trainable


@dataclass(frozen=True)
class Material:
    """What a fine-tune works on, read and checked."""

    base: Checkpoint
    fisher: Statistics | None
    data: dict[str, DataSet]
    encoder: Encoder
    encoded: dict[str, EncodedSet]
    seen: Seen

    def inputs(self, job: FinetuneJob, content: str) -> dict[str, Any]:
        """All that decides the result; ``content`` is the digest of the base's tensors."""
        found = inputs_of(job, self.base, content, self.data, self.encoded)
        if self.fisher is not None:
            found["Fisher information"] = self.fisher.digest
        if self.seen.digests:
            found |= {f"images ({name})": self.seen.digest(one.samples) for name, one in self.data.items()}
        return found

    @classmethod
    def read(cls, job: FinetuneJob, base: Path, folder: Path, progress: Progress) -> Material:
        """Read the base's headers and all data, and check that they go with the job.

        Raises:
            UsageError: wrong data or base.
        """
        checkpoint = _open_base(base)
        require_trainable(checkpoint, job)
        require_optimizer(job)
        fisher = _open_fisher(job, folder, checkpoint)
        data = _read(job, folder)
        encoder, seen = open_encoder(checkpoint, [one for found in data.values() for one in found.samples], progress)
        encoded = _encode(encoder, data, longest_allowed(job, checkpoint), progress)
        return cls(checkpoint, fisher, data, encoder, encoded, seen)


def _open_fisher(job: FinetuneJob, folder: Path, base: Checkpoint) -> Statistics | None:
    if job.fisher is None:
        return None
    from ktmerge.tuners.keeping.pull import open_fisher

    return open_fisher(folder / job.fisher, base)


def _open_base(base: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(base)
    packed = next((n for n, i in checkpoint.tensors.items() if tensor_class(n, i, checkpoint.config) == "quant"), None)
    if packed is not None:
        raise UsageError(f"{base}: is quantised ('{packed}'); fine-tune the model it was made from.")
    return checkpoint


def _read(job: FinetuneJob, folder: Path) -> dict[str, DataSet]:
    """All data of a job by their use; what is wrong with any of them is told together."""
    wanted: dict[str, list[Any]] = {
        "train": job.data,
        "replay": list(job.replay),
        "kept": [] if job.adapter is None else list(job.adapter.data),
        "upstream": [job.eval_upstream],
        "downstream": [job.eval_downstream],
    }
    images = None if job.image_root is None else folder / job.image_root
    found: dict[str, DataSet] = {}
    problems: list[str] = []
    for name, files in wanted.items():
        given = [file for file in files if file is not None]
        if not given:
            continue
        with collected(problems):
            found[name] = read_data(given, folder, job.format if name == "train" else "auto", images)
    refuse(problems)
    return found


def _encode(
    encoder: Encoder, data: Mapping[str, DataSet], max_length: int, progress: Progress
) -> dict[str, EncodedSet]:
    encoded = {}
    for name, found in data.items():
        encoder.require_template(found.samples)
        encoded[name] = encode_all(encoder, found.samples, max_length, progress, ", ".join(found.files))
        if encoded[name].dropped:
            progress.note(
                f"{', '.join(found.files)}: {encoded[name].dropped} of {len(found.samples)} samples are longer than "
                f"{max_length} tokens and left out."
            )
    return encoded


def longest_allowed(job: FinetuneJob, base: Checkpoint) -> int:
    """Tokens that a sample may have.

    Raises:
        UsageError: an adapter's prompt leaves no room.
    """
    room = room_of(job, base)
    return job.max_length if room is None else min(job.max_length, room)


def room_of(job: FinetuneJob, base: Checkpoint) -> int | None:
    """Tokens that the model reads beside an adapter's prompt; None where its configuration names no end.

    Raises:
        UsageError: the prompt leaves none.
    """
    length = context_length(base.config)
    prompt = job.adapter.prompt_length if job.adapter is not None else 0
    if length is None:
        return None
    if prompt >= length:
        raise UsageError(
            f"adapter.tokens: {prompt} vectors before the text leave no room for it in the {length} positions of the "
            "model; take fewer."
        )
    return length - prompt
