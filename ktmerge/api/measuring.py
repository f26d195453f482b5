"""Statistics of models on data, for the methods that need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.api.inputs import RecipeLike, loaded_recipe
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.load import validate
from ktmerge.recipes.overrides import apply_overrides
from ktmerge.recipes.schema import Statistics

if TYPE_CHECKING:
    from ktmerge.measurement import NamedMeasurement
    from ktmerge.tuners.statistics import StatisticsReport


def measure(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> StatisticsReport:
    """Measure what methods want to know of ``model`` on ``data``, into the folder ``out``.

    Args:
        model: folder or hub id; ``model+adapter`` for one with a PEFT adapter folded in.
        data: files as `finetune` reads them; empty for texts of the model's own, with ``self_generate=N``.
        out: the statistics; appear whole or not at all.
        device: auto, cpu or cuda.
        resume: go on where an interrupted run stopped.
        overwrite: replace statistics that are there.
        progress: where to report to.
        settings: any key of a recipe's ``statistics``, e.g. ``fisher="empirical"``.

    Raises:
        UsageError: an unknown setting, unreadable data, an existing output.
        KtmergeError: the run failed, e.g. out of memory.
    """
    paths = [data] if isinstance(data, (str, Path)) else data
    jobs = measurements(
        None, model=str(model), out=Path(out), settings={"data": [str(path) for path in paths], **settings}
    )
    return measure_all(jobs, device=device, resume=resume, overwrite=overwrite, progress=progress)[0]


def measurements(
    recipe: RecipeLike | None,
    *,
    only: Iterable[str] = (),
    model: str | None = None,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
) -> list[NamedMeasurement]:
    """The statistics a recipe says how to make, or those that ``model``, ``out`` and ``settings`` describe.

    Raises:
        UsageError: neither or both are given, something is missing, or the recipe has no such jobs.
    """
    from ktmerge.checkpoints.opening import locate_model
    from ktmerge.measurement import NamedMeasurement, measurements_of

    given = {key: value for key, value in (settings or {}).items() if value not in (None, [])}
    if recipe is not None:
        if model is not None or out is not None or given:
            raise UsageError("MODEL, --out and what is measured belong to 'ktmerge stats' without --recipe.")
        found = measurements_of(loaded_recipe(recipe, overrides), only)
        if not found:
            raise UsageError("the recipe says of no statistics how to make them: write data below 'statistics'.")
        return found
    if model is None or out is None:
        raise UsageError("give either --recipe, or a model, --data and --out.")
    if "data" not in given and "self_generate" not in given:
        raise UsageError("nothing to measure on: give --data, or --self-generate N for texts of the model's own.")
    job = validate(Statistics, apply_overrides(given, overrides), "statistics")
    path, adapter = locate_model(model, Path.cwd())
    return [NamedMeasurement(out.name, job, path, out, Path.cwd(), adapter)]


def measure_all(
    jobs: Iterable[NamedMeasurement],
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> list[StatisticsReport]:
    """Make statistics one after the other."""
    return [job.run(device=device, resume=resume, overwrite=overwrite, progress=progress) for job in jobs]
