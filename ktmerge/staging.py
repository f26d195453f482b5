"""The fine-tunes of a recipe in order: common first, in a stage that several share, then what is left of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.progress import Progress
from ktmerge.recipes.schema import Recipe

if TYPE_CHECKING:
    from ktmerge.recipes.finetuning import FinetuneJob
    from ktmerge.tuners import FinetuneReport

SHARED = "shared"
"""Name of the stage that all share, and of its folder, beside the first of its experts'."""
_OWN = frozenset({"data", "eval_upstream", "eval_downstream", "stop_upstream", "eval_every"})
"""Settings that the experts of a shared stage may have different."""


@dataclass(frozen=True)
class NamedJob:
    """A fine-tune with everything it needs to run: from which base, into which folder.

    Attributes:
        base: where it starts: the recipe's base, or what a stage before it leaves.
        folder: where the job's relative data paths start.
        origin: the recipe's base, if it starts elsewhere.
        note: what is to be told before it starts.
    """

    name: str
    job: FinetuneJob
    base: Path
    out: Path
    folder: Path
    origin: Path | None = None
    note: str = ""

    @property
    def shape(self) -> Path:
        """A model of the same shape and tokenizer that is there before any stage has run."""
        return self.origin or self.base

    def run(self, *, resume: bool, overwrite: bool, progress: Progress) -> FinetuneReport:
        """Tell the note, and fine-tune; raises what `ktmerge.tuners.finetune` raises."""
        from ktmerge import tuners

        if self.note:
            progress.note(self.note)
        return tuners.finetune(
            self.job, self.base, self.out, folder=self.folder, resume=resume, overwrite=overwrite, progress=progress
        )


def jobs_of(
    recipe: Recipe, only: Iterable[str] = (), change: Callable[[FinetuneJob], FinetuneJob] = lambda job: job
) -> list[NamedJob]:
    """The fine-tunes of a recipe in order, restricted to the experts named by ``only`` if any and what they start from.

    Args:
        recipe: has a finetune section.
        only: names of experts.
        change: what to do to every job first.

    Raises:
        UsageError: the recipe has no finetune section, no base, or no such expert; or a curriculum does not fit.
    """
    from ktmerge.checkpoints.hub import resolve

    if recipe.finetune is None:
        raise UsageError(f"the recipe '{recipe.name}' has no finetune section.")
    if recipe.base is None:
        raise UsageError(f"the recipe '{recipe.name}' names no base; add one, or give --base.")
    wanted = list(only) or list(recipe.finetune.experts)
    for name in wanted:
        if name not in recipe.finetune.experts:
            raise UsageError(f"--only {name}: no such fine-tune.{did_you_mean(name, recipe.finetune.experts)}")
    base = resolve(recipe.base, recipe.folder)
    jobs = [
        NamedJob(name, change(job), base, recipe.folder / recipe.experts[name].model, recipe.folder)
        for name, job in recipe.finetune.experts.items()
    ]
    return _only_named(staged(jobs), wanted)


def staged(jobs: Sequence[NamedJob]) -> list[NamedJob]:
    """Fine-tunes in the order they are to run, each curriculum of two stages taken apart.

    The experts whose job says ``curriculum: shared`` have a stage together, from the base on the data of all, that
    takes ``shared_steps`` of their steps; each goes on from there on its own data for the rest. So every expert has had
    as many steps as without, of as many samples.

    Raises:
        UsageError: two go into one folder; there is one such expert only, or they have different settings.
    """
    owners: dict[Path, str] = {}
    for job in jobs:
        if owners.setdefault(job.out, job.name) != job.name:
            raise UsageError(f"{job.out}: experts {owners[job.out]} and {job.name} go there; give each a folder.")
    together = [job for job in jobs if job.job.curriculum == "shared"]
    if not together:
        return list(jobs)
    first = together[0]
    if len(together) < 2:
        raise UsageError(
            f"{first.name}: curriculum shared needs several experts of a recipe that have it; for one task, take easy."
        )
    _require_alike(together)
    steps = first.job.max_steps or 0
    common = min(steps - 1, max(1, round(first.job.shared_steps * steps)))
    if steps < 2:
        raise UsageError("curriculum shared: two stages need max_steps of 2 at least.")
    shared = NamedJob(
        SHARED,
        first.job.model_copy(
            update={
                "data": list(dict.fromkeys(file for job in together for file in job.job.data)),
                "curriculum": "common" if first.job.shared_on == "common" else "none",
                "max_steps": common,
                "save_dtype": "float32",
                "eval_upstream": None,
                "eval_downstream": None,
                "stop_upstream": None,
            }
            | _not_shared(first.job)
        ),
        first.base,
        first.out.with_name(SHARED),
        first.folder,
        note=f"curriculum shared: {common} of {steps} steps on the data of {', '.join(job.name for job in together)}, "
        f"then {steps - common} of each on its own; the control is curriculum=none with max_steps={steps}.",
    )
    if any(job.out == shared.out for job in jobs):
        raise UsageError(f"{shared.out}: is where the shared stage goes; give the expert another folder.")
    rest = {"curriculum": "none", "max_steps": steps - common} | _not_shared(first.job)
    found = [shared]
    for job in jobs:
        if job.job.curriculum == "shared":
            own = job.job.model_copy(update=rest)
            found.append(NamedJob(job.name, own, shared.out, job.out, job.folder, job.base))
        else:
            found.append(job)
    return found


def _only_named(jobs: Iterable[NamedJob], wanted: Iterable[str]) -> list[NamedJob]:
    """Those that are wanted, and what has to run before them."""
    names = set(wanted)
    chosen = [job for job in jobs if job.name in names]
    needed = {job.base for job in chosen}
    return [job for job in jobs if job in chosen or job.out in needed]


def _not_shared(job: FinetuneJob) -> dict[str, Any]:
    """What says nothing but of a shared stage, as if it had not been written."""
    return {key: type(job).model_fields[key].default for key in ("shared_steps", "shared_on")}


def _require_alike(jobs: Sequence[NamedJob]) -> None:
    first = jobs[0]
    for other in jobs[1:]:
        for key in type(first.job).model_fields:
            if key not in _OWN and getattr(first.job, key) != getattr(other.job, key):
                raise UsageError(
                    f"curriculum shared: {first.name} and {other.name} share a stage, so they need the same {key}."
                )
