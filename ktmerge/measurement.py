"""The statistics that a recipe says how to make: of which model, from what, into which folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.progress import Progress
from ktmerge.recipes.schema import Recipe, Statistics

if TYPE_CHECKING:
    from ktmerge.tuners.statistics import StatisticsReport


@dataclass(frozen=True)
class NamedMeasurement:
    """Statistics to be made: of which model (``base`` or the expert's name), into which folder.

    Attributes:
        folder: where the job's relative paths start.
        adapter: to be folded into the model first.
    """

    name: str
    job: Statistics
    model: Path
    out: Path
    folder: Path
    adapter: Path | None = None

    def run(self, *, device: str, resume: bool, overwrite: bool, progress: Progress) -> StatisticsReport:
        """Make them; raises what `ktmerge.tuners.statistics.measure` raises."""
        from ktmerge.tuners import statistics

        return statistics.measure(
            self.job, self.model, self.out, folder=self.folder, adapter=self.adapter, device=device, resume=resume,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip


def measurements_of(recipe: Recipe, only: Iterable[str] = ()) -> list[NamedMeasurement]:
    """The statistics a recipe says how to make, restricted to ``only`` (``base`` or experts' names) if any.

    An expert is measured on what it was tuned on, unless its job says otherwise.

    Raises:
        UsageError: the recipe has no such job, or a model is not there.
    """
    from ktmerge.checkpoints.adapter import is_adapter
    from ktmerge.checkpoints.hub import resolve
    from ktmerge.checkpoints.opening import locate_model

    known = {"base": recipe.base, **{name: expert.model for name, expert in recipe.experts.items()}}
    jobs = {name: job for name in known if (job := recipe.statistics_job(name)) is not None and job.is_job}
    wanted = list(only) or list(jobs)
    for name in wanted:
        if name not in jobs:
            raise UsageError(f"--only {name}: the recipe makes no such statistics.{did_you_mean(name, jobs)}")
    found = []
    for name in wanted:
        job, model, out = jobs[name], known[name], recipe.statistics_folder(name)
        if model is None or out is None:
            raise UsageError(f"the recipe '{recipe.name}' names no base; add one, or give --base.")
        path, adapter = locate_model(model, recipe.folder)
        if adapter is None and name != "base" and recipe.base is not None and is_adapter(path):
            path, adapter = resolve(recipe.base, recipe.folder), path
        found.append(NamedMeasurement(name, job, path, out, recipe.folder, adapter))
    return found
