"""Searches over recipes, and their trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from ktmerge.api.inputs import RecipeLike, loaded_recipe
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.load import load_suite, suite_of
from ktmerge.recipes.schema import Recipe

if TYPE_CHECKING:
    from ktmerge.recipes.suites import Suite
    from ktmerge.sweep import Outcome
    from ktmerge.sweep.launch import Where
    from ktmerge.sweep.settings import Sampler


def sweep(
    recipe: RecipeLike,
    out: str | Path,
    *,
    ranges: Iterable[str] = (),
    methods: Sequence[str] = (),
    suite: str | Path | None = None,
    held_out: str | Path | None = None,
    keep_upstream: float | None = None,
    gain_share: float = 0.9,
    trials: int | None = None,
    sampler: str = "auto",
    screen: str | None = None,
    share: float | None = None,
    finalists: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    storage: str | None = None,
    workers: int = 1,
    slurm: bool = False,
    ray: bool = False,
    grace: float = 60.0,
    gigabytes: float = 8.0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Outcome:
    """Search for the blend that learns most among those that keep enough; report it on items that chose nothing.

    Args:
        recipe: what is not turned.
        out: folder for trials, table, picture and the chosen recipe.
        ranges: ``key=low:high``, ``key=low:high:log``, ``key=low:high:int`` or ``key=a|b|c``.
        methods: tried each; the recipe's by default.
        suite: sets to choose on; the recipe's eval section by default.
        held_out: sets to report on: the same tasks on other rows. Not needed if the suite keeps rows for ``selection``.
        keep_upstream: least upstream score, as a share of the base's; by default 0.99, of greedy soups none.
        gain_share: share of the experts' downstream gain that counts as the goal reached.
        trials: candidates in all, by default 60; not for greedy soups, and so the next three.
        sampler: auto, nsga2, tpe, gp, grid, qmc or curve; greedy: experts are added one by one, numbers stay.
        screen: subset (the default), divergence or full: how all candidates are compared before the best are scored on
            everything.
        share: of the selection items that are for screening, by default half.
        finalists: most candidates that are scored on everything, by default 8.
        seed: of the sampler.
        seeds: of each candidate's random choices (DARE's masks and the like): its scores are the mean over so many,
            each of which is blended and scored.
        storage: a database's URL, for workers on several machines; by default a journal file in ``out``.
        workers: processes that share the work.
        slurm: submit them as Slurm jobs.
        ray: run them as actors of the Ray cluster there is.
        grace: seconds of silence after which a worker on another machine counts as dead.
        gigabytes: most decompositions kept on disk for methods that need them; 0: none.
        device: auto, cpu or cuda.
        resume: go on with this sweep, or join it.
        overwrite: replace another sweep in ``out``.
        progress: where to report to.

    Raises:
        UsageError: something is wrong with recipe, ranges, suites, models, storage or ``out``, or a package or a
            cluster is missing; then nothing is written.
        KtmergeError: no candidate could be blended and scored, or a worker failed.
    """
    _require_optuna()
    from ktmerge.sweep.folder import begin, finish
    from ktmerge.sweep.halves import read_halves
    from ktmerge.sweep.launch import launch, require
    from ktmerge.sweep.settings import SweepSettings, journal
    from ktmerge.sweep.space import Range
    from ktmerge.sweep.worker import space_of, study_name

    if workers < 1:
        raise UsageError("--workers: must be 1 or more.")
    if slurm and ray:
        raise UsageError("--slurm, --ray: workers are jobs of one or actors of the other; leave one out.")
    loaded, folder = loaded_recipe(recipe).without_tuning(), Path(out)
    if loaded.base is None:
        raise UsageError(f"the recipe '{loaded.name}' names no base; add one.")
    chosen_on = load_suite(suite) if suite is not None else suite_of(loaded)
    reported_on, parts = _held_out(chosen_on, held_out)
    settings = SweepSettings(
        recipe=loaded, ranges=tuple(Range.parse(one) for one in ranges), methods=tuple(dict.fromkeys(methods)),
        suite=chosen_on, held_out=reported_on, parts=parts, storage=storage or journal(folder), gain=gain_share,
        sampler=cast("Sampler", sampler), seed=seed, seeds=seeds, grace=grace, device=device, gigabytes=gigabytes,
        **_measured(loaded),
        **_asked(sampler, keep=keep_upstream, trials=trials, screen=screen, share=share, finalists=finalists),
    )  # fmt: skip
    space_of(settings)
    kind: Where = "slurm" if slurm else "ray" if ray else "here"
    require(kind)
    study = study_name(settings, [one for half in read_halves(settings) for one in half], progress)
    begin(folder, settings, study, resume=resume, overwrite=overwrite, here=kind == "here")
    outcome = launch(settings, workers, kind, folder / "jobs", progress)
    finish(folder, outcome)
    return outcome


def sweep_files(out: str | Path) -> dict[str, Path]:
    """What a sweep has left in its folder, by what it is."""
    from ktmerge.sweep.folder import CHOSEN, PICTURE, RESULT, TABLE

    named = {"chosen recipe": CHOSEN, "candidates": TABLE, "picture": f"{PICTURE}.png", "all of it": RESULT}
    return {what: Path(out) / name for what, name in named.items() if (Path(out) / name).exists()}


def trial_recipe(study: str | Path, trial: int, *, storage: str | None = None) -> Recipe:
    """The recipe of a sweep's trial: it blends to the very model that was scored.

    Args:
        study: the sweep's folder.
        trial: its number.
        storage: the URL of the sweep's storage, if it needs a password.

    Raises:
        UsageError: there is no such sweep or trial.
    """
    _require_optuna()
    from ktmerge.sweep.folder import trial_recipe as of

    return of(Path(study), trial, storage)


def trial_to_blend(
    study: Path | None,
    trial: int | None,
    *,
    storage: str | None = None,
    needs_out: bool = False,
    besides: Mapping[str, object] = MappingProxyType({}),
) -> Recipe:
    """The recipe of a trial for a blend that nothing else changes.

    Args:
        study: the sweep's folder.
        trial: its number.
        storage: the URL of the sweep's storage, if it needs a password.
        needs_out: whether the blend's output is still to be named.
        besides: options that would change the recipe, by name.

    Raises:
        UsageError: there is no such sweep or trial, or something is missing or too much.
    """
    if study is None or trial is None:
        raise UsageError("a trial of a sweep is named by both --trial and --study, the sweep's folder.")
    given = [name for name, value in besides.items() if value]
    if given:
        raise UsageError(f"{given[0]}: a trial is blended as it was scored; leave it out.")
    if needs_out:
        raise UsageError("--out: say where the blended model goes, or add --dry-run.")
    return trial_recipe(study, trial, storage=storage)


def compare_with_trial(study: str | Path, trial: int, out: str | Path, progress: Progress = SILENT) -> list[str]:
    """Hold a blend of a trial's recipe to the model in memory that was scored as a finalist; what to say of it, if it
    was one.

    Raises:
        KtmergeError: they differ.
    """
    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.sweep.folder import scored_digest

    wanted, left_out = scored_digest(Path(study), trial)
    if wanted is None:
        return []
    if Checkpoint.open(Path(out)).content_digest(progress, left_out) != wanted:
        raise KtmergeError(f"{out}: differs from the model that was scored as trial {trial}; an input has changed.")
    if not left_out:
        return [f"every tensor has the bits that were scored as trial {trial}"]
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return [f"every tensor but '{left_out[0]}'{more}, not loaded then, has the bits that were scored as trial {trial}"]


def _held_out(suite: Suite, other: str | Path | None) -> tuple[Suite, tuple[str | None, str | None]]:
    """The suite to report on, and which rows of both."""
    if other is not None:
        return load_suite(other), ("selection" if suite.selection else None, None)
    if not suite.selection:
        raise UsageError(
            f"the suite '{suite.name}' keeps no rows for choosing: give it 'selection: 0.3', or name other sets to "
            "report on with --held-out. What chose a recipe says nothing of how good it is."
        )
    return suite, ("selection", "report")


def _measured(recipe: Recipe) -> dict[str, Any]:
    """The settings that the recipe's eval section has."""
    section = recipe.eval
    if section is None:
        return {}
    return {"batch_size": section.batch_size, "bootstrap": section.bootstrap, "bootstrap_seed": section.seed}


def _asked(sampler: str, **given: Any) -> dict[str, Any]:
    """The settings that were given; a greedy soup has no use for most of them."""
    asked = {name: value for name, value in given.items() if value is not None}
    if sampler != "greedy":
        return asked
    idle = [name for name in asked if name != "keep"]
    if idle:
        raise UsageError(
            f"--{idle[0]}: a greedy soup tries every expert, then one soup after another, each on all selection items; "
            "leave it out."
        )
    return {"keep": given["keep"], "screen": "full"}


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
        import scipy  # noqa: F401
    except ImportError:
        raise UsageError("sweeps need optuna and scipy; install them with: pip install 'ktmerge[sweep]'.") from None
