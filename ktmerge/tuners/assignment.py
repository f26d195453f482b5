"""What a training run is given, and what follows from it before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.progress import Progress
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.arguments import total_steps
from ktmerge.tuners.encode import Encoded, EncodedSet, Encoder
from ktmerge.tuners.images.agreement import shows_images
from ktmerge.tuners.loss import PIECE_TOKENS
from ktmerge.tuners.machine import Machine, choose_machine
from ktmerge.tuners.partial import Partial
from ktmerge.tuners.processes import ALONE, Processes

if TYPE_CHECKING:
    from ktmerge.checkpoints.statistics import Statistics
    from ktmerge.tuners.callbacks import Rhythm

EVALUATED = ("upstream", "downstream")
"""The sets whose losses are told while training."""


@dataclass(frozen=True)
class Assignment:
    """One job on its way through the Trainer.

    Attributes:
        job: what to do.
        base: that is trained.
        encoder: of the base.
        encoded: the samples; ``train``, and if wanted ``upstream``, ``downstream``, ``replay`` and ``kept``.
        partial: the folder that is worked in.
        name: what the progress bar calls it.
        progress: where to tell of it.
        fisher: opened statistics, if the job names some.
        processes: all that take part.
        folder: where the job's relative paths start.
        sizes: samples of each data file.
    """

    job: FinetuneJob
    base: Checkpoint
    encoder: Encoder
    encoded: Mapping[str, EncodedSet]
    partial: Partial
    name: str
    progress: Progress
    fisher: Statistics | None = None
    processes: Processes = ALONE
    folder: Path = field(default_factory=Path)
    sizes: Sequence[int] = ()

    @cached_property
    def machine(self) -> Machine:
        """What it runs on."""
        return choose_machine(self.job.precision)

    @cached_property
    def total(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.job, len(self.encoded["train"].samples))

    @cached_property
    def shows_images(self) -> bool:
        """Whether any sample has an image."""
        return shows_images(self.encoded.values())

    @property
    def piece_tokens(self) -> int | None:
        """Of how many tokens the pieces are in which a batch is worked on; None: whole.

        In the backward pass a tensor is stepped once, several processes must all take part in every pass, and the rows
        of pixels are not those of samples: there it is taken whole.
        """
        whole = self.job.optimizer_in_backward or self.processes.is_several or self.shows_images
        return PIECE_TOKENS if self.machine.device == "cpu" and not whole else None

    @property
    def samples(self) -> list[Encoded]:
        """What is trained on."""
        return self.encoded["train"].samples

    @cached_property
    def replayed(self) -> list[Encoded]:
        """What is replayed beside it."""
        old = self.encoded["replay"].samples if "replay" in self.encoded else []
        return [replace(sample, replayed=True) for sample in old]

    @property
    def evaluated(self) -> dict[str, list[Encoded]]:
        """The samples whose losses are told, by the name of their set."""
        return {name: self.encoded[name].samples for name in EVALUATED if name in self.encoded}

    @cached_property
    def rhythm(self) -> Rhythm:
        """When to log, to evaluate and to save."""
        from ktmerge.tuners.callbacks import Rhythm

        return Rhythm(
            total=self.total,
            log_every=self.job.log_every,
            eval_every=self.job.eval_every or max(1, math.ceil(self.total / 10)),
            save_every=self.job.save_every,
            evaluates=bool(self.evaluated),
        )

    def collator(self) -> Any:
        """What makes batches of samples as they are."""
        from ktmerge.tuners.trainer import build_collator

        return build_collator(self.encoder.tokenizer, extras=self.encoder.extras)
