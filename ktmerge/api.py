"""The verbs of ktmerge as functions: what the command line calls, and what ``import ktmerge`` offers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from ktmerge.errors import UsageError
from ktmerge.pipeline import NamedJob, NamedMeasurement, jobs_of, measurements_of, recipe_text
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes import gallery, load_recipe
from ktmerge.recipes.load import suite_of, validate
from ktmerge.recipes.overrides import apply_overrides
from ktmerge.recipes.schema import FinetuneJob, Recipe, Statistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktmerge.eval import Results
    from ktmerge.eval.summary import Sequential
    from ktmerge.merge import BlendReport
    from ktmerge.merge.diagnostics import Inspection
    from ktmerge.merge.extraction import Extraction
    from ktmerge.merge.plan import Plan
    from ktmerge.merge.pristine import Pristine
    from ktmerge.merge.recommendation import Recommendation
    from ktmerge.merge.verification import Verification
    from ktmerge.pipeline import RunResult
    from ktmerge.recipes import Suite
    from ktmerge.tuners import FinetuneReport, PreviewSample
    from ktmerge.tuners.statistics import StatisticsReport

__all__ = [
    "Pristine",
    "backward_transfer",
    "blend",
    "blend_into",
    "compare",
    "evaluate",
    "extract_lora",
    "finetune",
    "inspect",
    "load_recipe",
    "measure",
    "plan",
    "recommend",
    "report",
    "run",
    "verify",
]

RecipeLike = str | Path | Recipe


def __getattr__(name: str) -> Any:
    if name != "Pristine":
        raise AttributeError(f"module 'ktmerge.api' has no attribute '{name}'")
    from ktmerge.merge.pristine import Pristine

    return Pristine


def _loaded(recipe: RecipeLike, overrides: Iterable[str] = ()) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides=overrides)


# --- finetune ---------------------------------------------------------------------------------------------------------


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
        data: JSONL, JSON or parquet files of messages, ShareGPT, alpaca or prompt-completion rows.
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
    return finetune_all([job], resume=resume, overwrite=overwrite, progress=progress)[0]


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
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    if recipe is None:
        if base is None or not data or out is None:
            raise UsageError("give either --recipe, or all of --base, --data and --out.")
        document = apply_overrides({"data": list(data), **given}, overrides)
        return [_job(document, "--set", Path.cwd(), base, out)]
    if data or out is not None:
        raise UsageError("--data and --out belong to a fine-tune without --recipe; the recipe names its own.")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides=overrides, base=base)
    jobs = jobs_of(loaded, only)
    return [replace(job, job=_changed(job.job, given)) for job in jobs] if given else jobs


def _changed(job: FinetuneJob, settings: Mapping[str, Any]) -> FinetuneJob:
    return validate(FinetuneJob, {**job.model_dump(), **settings}, "the command line")


def finetune_all(
    jobs: Iterable[NamedJob], *, resume: bool = False, overwrite: bool = False, progress: Progress = SILENT
) -> list[FinetuneReport]:
    """Run fine-tunes one after the other."""
    from ktmerge import tuners

    return [
        tuners.finetune(
            job.job, job.base, job.out, folder=job.folder, resume=resume, overwrite=overwrite, progress=progress
        )
        for job in jobs
    ]


def preview(job: NamedJob, count: int) -> list[PreviewSample]:
    """The first ``count`` samples of a fine-tune, tokens marked as trained or not."""
    from ktmerge import tuners

    return tuners.preview(job.job, job.base, count, folder=job.folder)


def _job(document: dict[str, Any], where: str, folder: Path, base: str, out: Path) -> NamedJob:
    from ktmerge.checkpoints import resolve

    return NamedJob(out.name, validate(FinetuneJob, document, where), resolve(base, folder), out, folder)


# --- statistics -------------------------------------------------------------------------------------------------------


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
        model: folder or hub id.
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
    from ktmerge.checkpoints import resolve

    given = {key: value for key, value in (settings or {}).items() if value not in (None, [])}
    if recipe is not None:
        if model is not None or out is not None or given:
            raise UsageError("MODEL, --out and what is measured belong to 'ktmerge stats' without --recipe.")
        found = measurements_of(_loaded(recipe, overrides), only)
        if not found:
            raise UsageError("the recipe says of no statistics how to make them: write data below 'statistics'.")
        return found
    if model is None or out is None:
        raise UsageError("give either --recipe, or a model, --data and --out.")
    if "data" not in given and "self_generate" not in given:
        raise UsageError("nothing to measure on: give --data, or --self-generate N for texts of the model's own.")
    job = validate(Statistics, apply_overrides(given, overrides), "statistics")
    return [NamedMeasurement(out.name, job, resolve(model, Path.cwd()), out, Path.cwd())]


def measure_all(
    jobs: Iterable[NamedMeasurement],
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> list[StatisticsReport]:
    """Make statistics one after the other."""
    from ktmerge.tuners import statistics

    return [
        statistics.measure(
            job.job, job.model, job.out, folder=job.folder, device=device, resume=resume, overwrite=overwrite,
            progress=progress,
        )
        for job in jobs
    ]  # fmt: skip


# --- blend ------------------------------------------------------------------------------------------------------------


def plan(recipe: RecipeLike) -> Plan:
    """Resolve what would happen to every tensor, reading only headers.

    Raises:
        UsageError: everything that is wrong with the recipe or its inputs, one per line.
    """
    from ktmerge.merge.plan import plan_blend

    return plan_blend(_loaded(recipe))


def blend(
    recipe: RecipeLike,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> BlendReport:
    """Blend base and experts into the checkpoint folder ``out``; ``resume`` goes on where a killed run stopped.

    Raises:
        UsageError: wrong recipe or inputs, or ``out`` exists and ``overwrite`` is not set.
        KtmergeError: the run failed, e.g. a full disk; nothing is left half-written.
    """
    from ktmerge import merge

    return merge.blend(_loaded(recipe), Path(out), device=device, resume=resume, overwrite=overwrite, progress=progress)


def refuse_without_out(
    reference: str, *, overrides: Iterable[str] = (), base: str | None = None, experts: Sequence[str] = ()
) -> NoReturn:
    """Say that a blend needs an output, and with it whatever else is wrong.

    Raises:
        UsageError: always.
    """
    problems = ["--out: say where the blended model goes, or add --dry-run."]
    try:
        plan(load_recipe(reference, overrides=overrides, base=base, experts=experts))
    except UsageError as error:
        problems = [*str(error).splitlines(), *problems]
    raise UsageError("\n".join(problems))


def blend_into(
    model: Any,
    recipe: RecipeLike,
    sources: Pristine | None = None,
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> BlendReport:
    """Blend in place: write the result into the parameters of a loaded transformers model.

    A sweep gives one ``Pristine()`` as ``sources`` to all its blends: every weight is then read from disk once.
    """
    from ktmerge import merge

    return merge.blend_into(model, _loaded(recipe), sources, device=device, progress=progress)


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int = 16,
    energy: float | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Extraction:
    """Write what fine-tuning changed in the linear layers as a PEFT LoRA adapter into the folder ``out``.

    Args:
        base: folder or hub id.
        tuned: folder or hub id.
        out: folder of the adapter.
        rank: of every layer.
        energy: instead, each layer gets the least rank that holds this share of its change's squares.
        overwrite: replace an adapter that is there.
        progress: where to report to.

    Raises:
        UsageError: the models do not belong together, no linear layer changed, or ``out`` exists.
        KtmergeError: weights cannot be read.
    """
    from ktmerge.merge import extraction

    share = 0.9 if energy is None else energy
    return extraction.extract_lora(
        base, tuned, out, rule="rank" if energy is None else "energy", rank=rank, share=share, overwrite=overwrite,
        progress=progress,
    )  # fmt: skip


# --- eval -------------------------------------------------------------------------------------------------------------


def evaluate(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    suite: str | Path | None = None,
    recipe: RecipeLike | None = None,
    overrides: Iterable[str] = (),
    base: str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
    reference: str | None = None,
    part: str | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Results:
    """Score the base and every model on the same sets with the same code.

    Args:
        models: folders, ``name=folder`` strings, or a mapping of names to folders.
        suite: a suite file.
        recipe: instead of a suite, a recipe whose eval section names one.
        overrides: ``key=value`` strings for the recipe.
        base: the untuned model; defaults to the recipe's. Scored first, as ``base``.
        out: score file to write.
        batch_size: most sequences in a forward pass; scores do not depend on it.
        device: auto, cpu or cuda.
        reference: the full fine-tune among the models, for gain share and for what became of the items it changed.
        part: which rows: all, selection or report; see ``selection`` in the suite.
        cache: keep scores by model and task, and take from there what was scored before.
        overwrite: replace a score file that is there.
        progress: where to report to.

    Raises:
        UsageError: no suite, no base, a name given twice, unreadable data, an existing score file.
    """
    from ktmerge import eval as evaluation
    from ktmerge.checkpoints import resolve
    from ktmerge.eval.store import score_folder
    from ktmerge.recipes import load_suite

    loaded = None if recipe is None else _loaded(recipe, overrides)
    if suite is not None:
        sets = load_suite(suite)
    elif loaded is not None:
        sets = suite_of(loaded)
    else:
        raise UsageError("nothing to score on: give --suite, or --recipe with an eval section.")
    section = loaded.eval if loaded is not None else None
    named = _named(models)
    if base is not None:
        untuned = resolve(str(base), Path.cwd())
    elif loaded is not None and loaded.base is not None:
        untuned = resolve(loaded.base, loaded.folder)
    else:
        raise UsageError("the base is always scored in the same run: name it with --base.")
    if out is not None:
        refuse_existing(Path(out), overwrite)
    results = evaluation.evaluate(
        {"base": untuned, **{name: resolve(str(path), Path.cwd()) for name, path in named.items()}},
        sets,
        batch_size=batch_size,
        bootstrap=section.bootstrap if section else 2000,
        seed=section.seed if section else 0,
        device=device,
        reference=reference,
        part=part,
        cache=score_folder() if cache else None,
        progress=progress,
    )
    if out is not None:
        results.save(Path(out))
    return results


def _named(models: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    if isinstance(models, Mapping):
        return dict(models)
    named: dict[str, str | Path] = {}
    for model in models:
        name, equals, path = str(model).partition("=")
        if not equals:
            name, path = Path(os.path.abspath(str(model))).name, str(model)  # of "." and "..", too
        if not name or not path:
            raise UsageError(f"'{model}': give a model as folder or name=folder.")
        if name == "base":
            raise UsageError(f"{model}: only the untuned model is called 'base'; call this one otherwise: name=folder.")
        if name in named:
            raise UsageError(f"two models are called '{name}'; tell them apart with name=folder.")
        named[name] = path
    return named


def compare(scores: Sequence[str | Path]) -> Results:
    """Join score files of the same base and suite into one.

    Raises:
        UsageError: a file is no score file, or base or suite differ.
    """
    from ktmerge import eval as evaluation

    return evaluation.merge_results([evaluation.Results.load(Path(path)) for path in scores])


def backward_transfer(results: Results, sequence: str) -> Sequential:
    """What later tunings did to sets learned earlier.

    Args:
        results: the scores.
        sequence: ``model=set,model=set,...``: each stage's model and the set it learned, in order.

    Raises:
        UsageError: not written so, or no such model or set.
    """
    stages: dict[str, str] = {}
    for stage in sequence.split(","):
        model, equals, task = stage.strip().partition("=")
        if not equals or not model or not task or model in stages:
            raise UsageError(f"--sequence {sequence}: write model=set,model=set,... with every model once.")
        stages[model] = task
    return results.sequence(stages)


def report(
    scores: str | Path,
    out: str | Path,
    *,
    recipes: Iterable[str | Path] = (),
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a self-contained HTML page from a score file; return its path."""
    from ktmerge import eval as evaluation

    target = Path(out)
    texts = {Path(path).name: _text(Path(path)) for path in recipes}
    results = evaluation.Results.load(Path(scores))
    refuse_existing(target, overwrite)
    return evaluation.report(results, target, recipes=texts, title=title)


# --- the whole way ----------------------------------------------------------------------------------------------------


def run(
    recipe: RecipeLike,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> RunResult:
    """Go the whole way of a recipe: make its experts, measure, blend, score, report. Finished pieces are kept."""
    from ktmerge import pipeline

    return pipeline.run(
        _loaded(recipe), Path(out), device=device, resume=resume, overwrite=overwrite, progress=progress
    )


def inspect(
    base: str | Path,
    tuned: Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    headers_only: bool = False,
    common: bool = False,
    plot: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Inspection:
    """What is in a checkpoint and how far tuned models moved from it, by part and layer.

    Args:
        base: folder or hub id.
        tuned: folders or hub ids (of PEFT adapters too), ``name=model`` strings, or a mapping of names to models.
        headers_only: read only the files' headers.
        common: also say how much the changes of two or more tuned models have in common; takes minutes.
        plot: write a heat map, layer by kind of tensor, to this PNG, SVG or PDF file.
        overwrite: replace a picture that is there.
        progress: where to report to.

    Raises:
        UsageError: a folder is no checkpoint, a name is given twice, a model shares nothing with the base, or the
            picture cannot be drawn or exists.
        KtmergeError: weights cannot be read.
    """
    from ktmerge.merge import diagnostics

    models = _named(tuned)
    target = None if plot is None else Path(plot)
    if target is not None:
        diagnostics.require_drawable(target, models, headers_only=headers_only)
        refuse_existing(target, overwrite)
    found = diagnostics.inspect(base, models, headers_only=headers_only, common=common, progress=progress)
    if target is not None:
        from ktmerge.eval.results import write_whole

        write_whole(target, diagnostics.heat_map(found, target))
    return found


def recommend(
    base: str | Path,
    tuned: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    statistics: bool = False,
    progress: Progress = SILENT,
) -> Recommendation:
    """Which three recipes to try on these models, why, and the commands for it.

    Args:
        base: folder or hub id.
        tuned: at least one; as of `inspect`.
        statistics: whether data of both sides are at hand, so that methods that measure on them are worth a try.
        progress: where to report to.

    Raises:
        UsageError: no tuned model, one that shares nothing with the base, or one that equals it.
        KtmergeError: weights cannot be read.
    """
    from ktmerge.merge.diagnostics.rank import rank_share
    from ktmerge.merge.recommendation import recommend as choose

    models = {name: str(model) for name, model in _named(tuned).items()}
    if not models:
        raise UsageError("name at least one tuned model after the base.")
    found = inspect(base, models, progress=progress)
    for name in models:
        if not found.matrices[name].changed:
            raise UsageError(f"{name}: none of its matrices differs from the base's; there is nothing to blend.")
    rank = rank_share(base, models)
    return choose(found, str(base), models, statistics=statistics, rank=rank)


@dataclass(frozen=True)
class Checked:
    """What `check` found to be in order."""

    recipe: Recipe
    plan: Plan | None
    suite: Suite | None

    def pairs(self) -> dict[str, str]:
        found = {"recipe": f"{self.recipe.name} is valid"}
        blend_section = self.recipe.blend
        if self.plan is not None:
            found["blend"] = (
                f"{len(self.plan.tensors)} tensors, {', '.join(e.name for e in self.plan.experts)} into base"
            )
        elif blend_section is not None:
            found["blend"] = (
                f"{blend_section.method or 'stages'}; tensors not checked, as not all of its inputs are there yet"
            )
        if self.recipe.finetune is not None:
            found["finetune"] = ", ".join(self.recipe.finetune.experts)
        if self.suite is not None:
            found["eval"] = f"{len(self.suite.upstream)} upstream, {len(self.suite.downstream)} downstream sets"
        return found

    def to_json(self) -> dict[str, Any]:
        return {"valid": True, **self.pairs()}


def check(
    reference: str, *, overrides: Iterable[str] = (), base: str | None = None, experts: Iterable[str] = ()
) -> Checked:
    """Find every mistake of a recipe that shows without reading weights or data.

    Tensors are checked when base and experts are named and there; an expert that the recipe itself makes need not be.

    Raises:
        UsageError: everything that is wrong, one per line.
    """
    from ktmerge.merge.plan import check_recipe, plan_blend

    recipe = load_recipe(reference, overrides=overrides, base=base, experts=experts)
    problems: list[str] = []
    planned: Plan | None = None
    suite: Suite | None = None
    try:
        check_recipe(recipe)
        if recipe.blend is not None and recipe.base is not None and recipe.experts and not _to_be_made(recipe):
            planned = plan_blend(recipe)
    except UsageError as error:
        problems += str(error).splitlines()
    try:
        suite = suite_of(recipe) if recipe.eval is not None else None
    except UsageError as error:
        problems += str(error).splitlines()
    problems += _missing_data(recipe, suite)
    problems += _not_trainable(recipe)
    if problems:
        raise UsageError("\n".join(problems))
    return Checked(recipe, planned, suite)


def _to_be_made(recipe: Recipe) -> bool:
    """Whether an expert or statistics are missing because the recipe says how to make them and has yet to."""
    jobs = recipe.finetune.experts if recipe.finetune is not None else {}
    if any(not (recipe.folder / recipe.experts[name].model).exists() for name in jobs):
        return True
    sections = {name: recipe.statistics_of(name) for name in ("base", *recipe.experts)}
    made = [recipe.statistics_folder(name) for name, section in sections.items() if section and section.is_job]
    return any(folder is not None and not folder.exists() for folder in made)


def _not_trainable(recipe: Recipe) -> list[str]:
    """What the fine-tunes name of a base that is there and does not have it."""
    if recipe.finetune is None or recipe.base is None or not (recipe.folder / recipe.base).is_dir():
        return []
    from ktmerge.checkpoints import Checkpoint
    from ktmerge.tuners.trained import require_trainable

    problems = []
    for name, job in recipe.finetune.experts.items():
        try:
            require_trainable(Checkpoint.open(recipe.folder / recipe.base), job)
        except UsageError as error:
            problems.append(f"finetune.experts.{name}: {error}")
    return problems


def _missing_data(recipe: Recipe, suite: Suite | None) -> list[str]:
    wanted: list[tuple[str, Path]] = []
    for name, job in recipe.finetune.experts.items() if recipe.finetune is not None else ():
        files = [*job.data, *job.replay, job.eval_upstream, job.eval_downstream]
        wanted += [(f"finetune.experts.{name}", recipe.folder / file) for file in files if file is not None]
    for name in ("base", *recipe.experts):
        section = recipe.statistics_of(name)
        where = "statistics" if name == "base" else f"experts.{name}.statistics"
        wanted += [(where, recipe.folder / file) for file in (section.data if section is not None else ())]
    sets = [task for task in suite.tasks() if not task.data.startswith("hf:")] if suite is not None else []
    wanted += [(f"eval, task {task.name}", suite.folder / task.data) for task in sets if suite is not None]
    missing = [(where, path) for where, path in wanted if not path.exists() or (path.is_dir() and where[:4] != "eval")]
    return [f"{where}: {path}: no such file." for where, path in missing]


# --- recipes ----------------------------------------------------------------------------------------------------------


def verify(
    out: str | Path,
    recipe: RecipeLike | None = None,
    *,
    base: str | None = None,
    experts: Iterable[str] = (),
    rebuild: bool = False,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Verification:
    """Hold a blended model against its record, and if asked blend again and compare bytes.

    Args:
        out: a folder that `blend` wrote; it is only read.
        recipe: what it was made by. If not given and something has to be blended or compared, the recipe in its
            record, whose paths start at the working folder.
        base: where the base is, if not where that recipe says.
        experts: ``name=model`` where experts are.
        rebuild: blend again, into a temporary folder beside ``out``.
        device: auto, cpu or cuda.
        progress: where to report.

    Raises:
        UsageError: ``out`` has no record, or the recipe or its inputs are wrong.
        KtmergeError: something cannot be read, or the new blend failed.
    """
    from ktmerge.merge.verification import recorded_recipe
    from ktmerge.merge.verification import verify as held

    given = list(experts)
    if recipe is not None:
        found: Recipe | None = (
            load_recipe(recipe, base=base, experts=given) if not isinstance(recipe, Recipe) else recipe
        )
    elif rebuild or base is not None or given:
        pairs = [one.partition("=") for one in given]
        for name, equals, model in pairs:
            if not equals or not model:
                raise UsageError(f"--expert {name}: write name=model.")
        found = recorded_recipe(Path(out), base, {name: model for name, _, model in pairs})
    else:
        found = None
    return held(Path(out), found, rebuild=rebuild, device=device, progress=progress)


def show_recipe(reference: str, overrides: Iterable[str] = ()) -> str:
    """The text of a recipe; with overrides, the recipe as understood."""
    changed = list(overrides)
    if changed:
        return recipe_text(load_recipe(reference, overrides=changed))
    path, _ = gallery.locate(reference)
    return _text(path)


@dataclass(frozen=True)
class Listed:
    """One recipe of the gallery.

    Attributes:
        when: to use it.
        method: what it blends with.
        data: what ``ktmerge stats`` has to measure before; ``none`` if nothing.
    """

    name: str
    when: str
    method: str
    data: str


def list_recipes() -> list[Listed]:
    """Every recipe of the gallery, by name."""
    from ktmerge.merge.catalogue import NO_DATA, data_of_recipe

    listed = []
    for name in gallery.names():
        recipe = load_recipe(name)
        method = (recipe.blend.method or "stages") if recipe.blend else ""
        data = data_of_recipe(recipe.blend) if recipe.blend else NO_DATA
        listed.append(Listed(name, recipe.description, method, data))
    return listed


def import_recipe(source: Path, out: Path | None, *, overwrite: bool = False) -> tuple[str, list[str]]:
    """Read a mergekit YAML; return the recipe's text and where its semantics differ. Writes it to ``out`` if given."""
    from ktmerge.merge.importer import import_mergekit

    if out is not None:
        refuse_existing(out, overwrite)
    document, differences = import_mergekit(_text(source))
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    if out is not None:
        with failing_clearly(out):
            out.write_text(text, encoding="utf-8")
    return text, differences


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file silently.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is not set, or its folder does not exist.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another name, or add --overwrite.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist.")


@contextmanager
def failing_clearly(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal into a sentence."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file in UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
