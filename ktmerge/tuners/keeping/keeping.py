"""What a job asks for to keep the base, put together for one model: what the Trainer and the run are given.

Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.statistics import Statistics
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.callbacks import EpochCallback, EvaluationCallback, StepCallback
from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.keeping.average import Average, Exponential, Latest
from ktmerge.tuners.keeping.distil import Teacher
from ktmerge.tuners.keeping.guard import Guard
from ktmerge.tuners.keeping.pull import Pull, read_fisher
from ktmerge.tuners.keeping.replay import ReplaySampler


@dataclass(frozen=True)
class Keeping:
    """Each is None where the job does not ask for it.

    Attributes:
        parameters: those that are trained.
    """

    parameters: Mapping[str, Parameter]
    pull: Pull | None
    teacher: Teacher | None
    sampler: ReplaySampler | None
    guard: Guard | None
    average: Average | None

    @classmethod
    def of(
        cls,
        job: FinetuneJob,
        base: Checkpoint,
        model: torch.nn.Module,
        *,
        lean: bool,
        total: int,
        samples: tuple[int, int],
        fisher: Statistics | None,
    ) -> Keeping:
        """For a model as it was loaded, of which what is not trained is frozen.

        Args:
            job: what is asked for.
            base: what was loaded.
            model: of it.
            lean: see `ktmerge.tuners.keeping.distil.Teacher`.
            total: steps of the run.
            samples: how many are trained on and how many are replayed.
            fisher: opened statistics, if the job names some.

        Raises:
            UsageError: the statistics lack a tensor that is trained.
        """
        own = {name: one for name, one in model.named_parameters() if one.requires_grad}
        stiffness = None if fisher is None else read_fisher(fisher, base, own)
        new, old = samples
        return cls(
            own,
            Pull(own, job.l2_sp, stiffness) if job.l2_sp else None,
            Teacher(model, job.distill, job.temperature, lean=lean) if job.distill else None,
            ReplaySampler(new, old, job.batch_size, job.replayed, job.seed) if job.replay else None,
            None if job.stop_upstream is None else Guard(own, job.stop_upstream),
            _average(job, own, total),
        )

    @property
    def callbacks(self) -> list[Any]:
        """What the Trainer is to tell; steps after whatever else changes weights at them."""
        found: list[Any] = []
        if self.average is not None:
            found.append(StepCallback(self.average.after_step))
        if self.sampler is not None:
            found.append(EpochCallback(self.sampler.set_epoch))
        if self.guard is not None:
            found.append(EvaluationCallback(self.guard.watch))
        return found

    @property
    def keepers(self) -> list[Any]:
        """What has a state that belongs into checkpoints."""
        return [one for one in (self.guard, self.average) if one is not None]


def taught(job: FinetuneJob) -> Any:
    """Which samples the base is distilled on; None if it is not."""
    if not job.distill:
        return None

    def is_taught(sample: Encoded) -> bool:
        return job.distill_on == "both" or (job.distill_on == "replay") == sample.replayed

    return is_taught


def _average(job: FinetuneJob, parameters: Mapping[str, Parameter], total: int) -> Average | None:
    if job.average == "ema":
        return Exponential(parameters, job.ema_decay)
    if job.average == "lawa":
        return Latest(parameters, job.lawa_window, job.lawa_every or max(1, math.ceil(total / 20)))
    return None
