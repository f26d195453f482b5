"""The whole way of one recipe: make its experts, measure, blend, score, report.

Each piece appears whole and is kept if it is already what the recipe asks for, so an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError
from ktmerge.measurement import measurements_of
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.document import yaml_text
from ktmerge.recipes.load import suite_of
from ktmerge.recipes.schema import Recipe
from ktmerge.staging import jobs_of

if TYPE_CHECKING:
    from ktmerge.eval import Results
    from ktmerge.recipes.evaluation import Evaluation
    from ktmerge.recipes.suites import Suite

Located = Path | tuple[Path, Path]
"""Where an expert is: its folder, or those of a model and an adapter over it."""
BLENDED = "blended"
SCORES = "scores.json"
REPORT = "report.html"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind; a piece the recipe does not ask for is None.

    Attributes:
        experts: the folder of each; of ``model+adapter`` both.
    """

    experts: dict[str, Located]
    blended: Path | None
    results: Results | None
    report: Path | None
    statistics: dict[str, Path] = field(default_factory=dict)

    def pairs(self) -> dict[str, str]:
        found = {f"expert {name}": _spelled(expert) for name, expert in self.experts.items()}
        found |= {f"statistics of {name}": str(path) for name, path in self.statistics.items()}
        if self.blended is not None:
            found["blended model"] = str(self.blended)
        if self.report is not None:
            found["report"] = str(self.report)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "experts": {name: _spelled(expert) for name, expert in self.experts.items()},
            "statistics": {name: str(path) for name, path in self.statistics.items()},
            "blended": None if self.blended is None else str(self.blended),
            "report": None if self.report is None else str(self.report),
            "scores": None if self.results is None else self.results.to_json(),
        }


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> RunResult:
    """Make the experts the recipe describes and the statistics, blend, score all models, report; all under ``out``.

    With ``resume``, pieces that are already what the recipe asks for are kept. With ``overwrite``, each piece stays
    until its successor is whole, and scores until the blend they tell of is replaced.

    Raises:
        UsageError: the recipe or its inputs are wrong, or ``out`` exists and neither flag is set.
        KtmergeError: a piece failed; the finished ones stay.
    """
    from ktmerge.checkpoints.hub import resolve

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("ktmerge run is one process; start 'ktmerge finetune' by torchrun, then run it alone.")
    if recipe.base is None:
        raise UsageError(f"the recipe '{recipe.name}' names no base.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; choose another folder.")
    if out.exists() and any(out.iterdir()) and not (resume or overwrite):
        raise UsageError(f"{out} exists; add --resume to go on with it, or --overwrite to replace it.")
    base = resolve(recipe.base, recipe.folder)
    suite = _scorable_suite(recipe, base)
    experts = make_experts(recipe, resume=resume, overwrite=overwrite, progress=progress)
    statistics = make_statistics(recipe, device=device, resume=resume, overwrite=overwrite, progress=progress)
    out.mkdir(parents=True, exist_ok=True)
    afresh = overwrite and not resume
    blended = None
    if recipe.blend is not None:
        blended = make_blend(recipe, out / BLENDED, device=device, resume=resume, afresh=afresh, progress=progress)
    if afresh:
        _remove_old(out, keep_blend=blended is not None)
    results = page = None
    if suite is not None and recipe.eval is not None:
        models = {"base": base, **experts, **({} if blended is None else {"blended": blended})}
        results = _score(models, suite, recipe.eval, device, progress)
        results.save(out / SCORES)
        page = _report(results, out / REPORT, recipe, experts)
    return RunResult(experts, blended, results, page, statistics)


def _score(
    models: Mapping[str, Located], suite: Suite, section: Evaluation, device: str, progress: Progress
) -> Results:
    from ktmerge.eval import evaluate
    from ktmerge.eval.store import score_folder

    return evaluate(
        models,
        suite,
        batch_size=section.batch_size,
        bootstrap=section.bootstrap,
        seed=section.seed,
        device=device,
        cache=score_folder(),
        progress=progress,
    )


def _report(results: Results, out: Path, recipe: Recipe, experts: Mapping[str, Located]) -> Path:
    from ktmerge.checkpoints.files import write_whole
    from ktmerge.eval import render

    page = render(
        results,
        title=f"ktmerge: {recipe.name}",
        recipes={recipe.name: recipe_text(recipe)},
        training=training_logs(recipe, experts),
        tuned=list(experts),
    )
    write_whole(out, page)
    return out


def _remove_old(out: Path, *, keep_blend: bool) -> None:
    """Remove the pieces of an earlier run that tell of what is replaced, or that the recipe no longer asks for."""
    from ktmerge.merge.record import FILE

    for file in (SCORES, REPORT):
        (out / file).unlink(missing_ok=True)
    if not keep_blend and (out / BLENDED / FILE).exists():
        shutil.rmtree(out / BLENDED, ignore_errors=True)


def make_experts(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: Progress = SILENT
) -> dict[str, Located]:
    """Fine-tune the experts that the recipe describes and that are not there yet; the folders of all experts by name.

    An expert that was made by the very same job is kept.

    Raises:
        UsageError: a folder holds something else and ``overwrite`` is not set, or a job's inputs are wrong.
        KtmergeError: a fine-tune failed.
    """
    from ktmerge.checkpoints.opening import locate_model

    made: dict[str, Path] = {}
    for job in jobs_of(recipe) if recipe.finetune is not None else ():
        kept = job.out.exists() and not overwrite
        job.run(resume=resume or kept, overwrite=overwrite, progress=progress)
        made[job.name] = job.out
    found: dict[str, Located] = {}
    for name, expert in recipe.experts.items():
        model, adapter = (made[name], None) if name in made else locate_model(expert.model, recipe.folder)
        found[name] = model if adapter is None else (model, adapter)
    return found


def make_statistics(
    recipe: Recipe,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Path]:
    """Make the statistics that the recipe describes and that are not there yet; their folders by model.

    Those that were made by the very same job of the very same model are kept.

    Raises:
        UsageError: a folder holds something else and ``overwrite`` is not set, or a job's inputs are wrong.
        KtmergeError: a measurement failed.
    """
    made = {}
    for one in measurements_of(recipe):
        kept = one.out.exists() and not overwrite
        one.run(device=device, resume=resume or kept, overwrite=overwrite, progress=progress)
        made[one.name] = one.out
    return made


def make_blend(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    afresh: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Blend into ``out`` unless it already holds this blend of these files; ``afresh`` even then.

    Raises:
        UsageError: the recipe or its inputs are wrong.
        KtmergeError: the blend failed; what was there stays.
    """
    from ktmerge import merge
    from ktmerge.merge.lock import recorded
    from ktmerge.merge.planning import plan_blend

    if not afresh and recorded(plan_blend(recipe), out, progress) is not None:
        progress.note(f"{out} already holds this blend; kept")
    else:
        merge.blend(recipe, out, device=device, resume=resume, overwrite=True, progress=progress)
    return out


def training_logs(recipe: Recipe, experts: Mapping[str, Located]) -> dict[str, list[dict[str, Any]]]:
    """The losses of every fine-tune that left some, a shared stage first; none of experts that were made elsewhere."""
    stages = {job.name: job.out for job in jobs_of(recipe)} if recipe.finetune is not None else {}
    logs = {name: training_log(folder) for name, folder in {**stages, **experts}.items() if isinstance(folder, Path)}
    return {name: log for name, log in logs.items() if log}


def training_log(expert: Path) -> list[dict[str, Any]]:
    """The losses of a fine-tune; empty for an expert that was made elsewhere."""
    from ktmerge.tuners.report import log_lines

    try:
        return log_lines(expert / "log.jsonl")
    except (OSError, ValueError):
        return []


def _scorable_suite(recipe: Recipe, base: Path) -> Suite | None:
    """The suite, held to the base once before hours of work end at a mistake in it."""
    if recipe.eval is None:
        return None
    from ktmerge.eval.evaluation import require_scorable

    suite = suite_of(recipe)
    require_scorable(base, suite)
    return suite


def _spelled(expert: Located) -> str:
    return str(expert) if isinstance(expert, Path) else "+".join(map(str, expert))


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML, without what is left at its default."""
    document = {"ktmerge": recipe.ktmerge} | recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml_text(document)
