"""Fine-tunes, of a recipe or by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.api.inputs import RecipeLike
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes import load_recipe
from ktmerge.recipes.load import validate
from ktmerge.recipes.overrides import apply_overrides
from ktmerge.recipes.schema import Recipe
from ktmerge.staging import NamedJob, jobs_of, staged

if TYPE_CHECKING:
    from ktmerge.recipes.finetuning import FinetuneJob
    from ktmerge.tuners import Estimate, FinetuneReport, PreviewSample


def finetune(
    base: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> FinetuneReport:
    """Fine-tune ``base``, all of it or what ``train`` says, on ``data`` into the folder ``out``.

    Args:
        base: folder or hub id.
        data: JSONL, JSON or parquet files of messages, ShareGPT, alpaca or prompt-completion rows, with images for
            models that see.
        out: the tuned checkpoint; appears whole or not at all.
        resume: go on where an interrupted run stopped.
        overwrite: replace a tuned checkpoint that is there.
        progress: where to report to.
        settings: any key of a recipe's ``finetune.experts.<name>``, e.g. ``learning_rate=2e-5``,
            ``train="last:4+head"``.

    Raises:
        UsageError: an unknown setting, unreadable data, an existing output.
        KtmergeError: the run failed, e.g. out of memory.
    """
    paths = [data] if isinstance(data, (str, Path)) else data
    document = {"data": [str(path) for path in paths], **settings}
    job = _job(document, "finetune", Path.cwd(), str(base), Path(out))
    return finetune_all(staged([job]), resume=resume, overwrite=overwrite, progress=progress)[0]


def finetune_jobs(
    recipe: RecipeLike | None,
    *,
    only: Iterable[str] = (),
    base: str | None = None,
    data: Sequence[str] = (),
    out: Path | None = None,
    overrides: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[NamedJob]:
    """The fine-tunes a recipe describes, or the one that ``base``, ``data`` and ``out`` describe.

    Args:
        recipe: file, gallery name, or a loaded recipe.
        only: of the recipe, just these experts.
        base: folder or hub id; replaces the recipe's.
        data: without a recipe: what to train on.
        out: without a recipe: where the tuned model goes.
        overrides: ``key=value`` strings; of the recipe, or without one of the job.
        settings: keys of the job by name, in every job; None stands for "not given".

    Raises:
        UsageError: neither or both are given, or the recipe has no such experts.
    """
    given = _given(settings or {})
    if recipe is None:
        if base is None or not data or out is None:
            raise UsageError("give either --recipe, or all of --base, --data and --out.")
        if only:
            raise UsageError("--only chooses experts of a recipe; give --recipe, too, or leave it out.")
        document = apply_overrides({"data": list(data), **given}, overrides)
        if isinstance(document.get("adapter"), Mapping) and "name" not in document["adapter"]:
            raise UsageError("settings of an adapter need its name: --adapter lora, dora, pissa, ia3, prompt, ...")
        return staged([_job(document, "--set", Path.cwd(), base, out)])
    if data or out is not None:
        raise UsageError("--data and --out belong to a fine-tune without --recipe; the recipe names its own.")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides=overrides, base=base)
    return jobs_of(loaded, only, lambda job: _changed(job, given) if given else job)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is not None; of an adapter likewise."""
    given = {key: value for key, value in settings.items() if value is not None}
    if isinstance(given.get("adapter"), Mapping):
        given["adapter"] = {key: value for key, value in given["adapter"].items() if value is not None}
    return {key: value for key, value in given.items() if value != {}}


def _changed(job: FinetuneJob, settings: Mapping[str, Any]) -> FinetuneJob:
    document = {**job.model_dump(exclude_unset=True), **settings}
    if job.adapter is not None and isinstance(settings.get("adapter"), Mapping):
        same = settings["adapter"].get("name", job.adapter.name) == job.adapter.name
        document["adapter"] = {**(job.adapter.model_dump(exclude_unset=True) if same else {}), **settings["adapter"]}
    return validate(type(job), document, "the command line")


def finetune_all(
    jobs: Iterable[NamedJob], *, resume: bool = False, overwrite: bool = False, progress: Progress = SILENT
) -> list[FinetuneReport]:
    """Run fine-tunes one after the other."""
    return [job.run(resume=resume, overwrite=overwrite, progress=progress) for job in jobs]


def estimate(job: NamedJob, processes: int = 1) -> Estimate:
    """The memory that one of ``processes`` takes for a fine-tune, from headers and configuration alone."""
    from ktmerge import tuners
    from ktmerge.checkpoints.checkpoint import Checkpoint

    return tuners.estimate(job.job, Checkpoint.open(job.shape), processes)


def preview(job: NamedJob, count: int) -> list[PreviewSample]:
    """The first ``count`` samples of a fine-tune, tokens marked as trained or not."""
    from ktmerge import tuners

    return tuners.preview(job.job, job.shape, count, folder=job.folder)


def _job(document: dict[str, Any], where: str, folder: Path, base: str, out: Path) -> NamedJob:
    from ktmerge.checkpoints.hub import resolve
    from ktmerge.recipes.finetuning import FinetuneJob

    return NamedJob(out.name, validate(FinetuneJob, document, where), resolve(base, folder), out, folder)
