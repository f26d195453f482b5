"""The order of the samples, where it is neither plain shuffling nor that of replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ktmerge.tuners.assignment import Assignment

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.tuners.curriculum import Ordered
    from ktmerge.tuners.packing import LengthSampler

CURRICULUM = "ktmerge-curriculum.json"
"""File beside the expert: the score of every sample, the lower the earlier, and the order; with a curriculum."""


def by_curriculum(given: Assignment, model: Any) -> Ordered | None:
    """What is easy, or common, first, as ``model`` says; None if the job has no such curriculum."""
    job, found = given.job, given.encoded["train"]
    if job.curriculum not in ("easy", "common"):
        return None
    from ktmerge.tuners import curriculum

    collate = given.collator()

    def scores() -> Tensor:
        if job.curriculum == "easy":
            return curriculum.difficulties(model, found.samples, collate, job.batch_size, given.progress)
        tasks = curriculum.tasks_of(given.sizes, found.places)
        return curriculum.strangeness(model, found.samples, tasks, collate, job.batch_size, given.progress)

    given.progress.note(
        f"curriculum {job.curriculum}: {given.total} steps; its control is the same with curriculum=none and "
        f"max_steps={given.total}."
    )
    return curriculum.ordered(scores, given.partial.folder / CURRICULUM)


def by_length(given: Assignment) -> LengthSampler | None:
    """Batches of samples of like length; None if the job does not ask for them."""
    from ktmerge.tuners.packing import LengthSampler

    lengths = [len(sample) for sample in given.samples]
    return LengthSampler(lengths, given.job.samples_a_step, given.job.seed) if given.job.group_by_length else None
