"""Scores of models on sets, held against one another and drawn."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.api.asked import asked, referred
from ktmerge.api.inputs import RecipeLike, named_models, refuse_existing, text_of
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from ktmerge.eval import Results
    from ktmerge.eval.summary import Sequential


def evaluate(
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    suite: str | Path | Sequence[str | Path] | None = None,
    recipe: RecipeLike | None = None,
    overrides: Iterable[str] = (),
    base: str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    reference: str | None = None,
    part: str | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Results:
    """Score the base and every model on the same sets with the same code.

    Args:
        models: folders, ``name=folder`` strings, or a mapping of names to folders; of checkpoints, or of adapters for
            the base, or ``model+adapter``.
        suite: a suite file or the name of a ready suite; or several, scored as one.
        recipe: instead of a suite, a recipe whose eval section names one.
        overrides: ``key=value`` strings for the recipe.
        base: the untuned model; defaults to the recipe's. Scored first, as ``base``.
        out: score file to write.
        batch_size: most sequences in a forward pass, by default what fits into memory; scores do not depend on it.
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
    from ktmerge.eval.store import score_folder

    wanted = asked(suite, recipe, overrides, base)
    named = named_models(models)
    if out is not None:
        refuse_existing(Path(out), overwrite)
    results = evaluation.evaluate(
        {"base": wanted.base, **{name: referred(str(path)) for name, path in named.items()}},
        wanted.suite,
        batch_size=batch_size,
        bootstrap=wanted.bootstrap,
        seed=wanted.seed,
        device=device,
        reference=reference,
        part=part,
        cache=score_folder() if cache else None,
        progress=progress,
    )
    if out is not None:
        results.save(Path(out), overwrite=overwrite)
    return results


def import_scores(
    files: Sequence[str],
    *,
    base: str | None = None,
    upstream: Sequence[str] = (),
    downstream: Sequence[str] = (),
    metrics: Sequence[str] = (),
    items: Sequence[str] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Results:
    """Join what lm_eval, lmms-eval or VLMEvalKit measured of several models into one score file.

    Args:
        files: result and sample files or folders of such, as ``name=path``; of one model as many as there are. Without
            a name the model is called as its files call it.
        base: name of the untuned model; by default the one called base, else the first.
        upstream: sets the model must keep.
        downstream: sets it was tuned for.
        metrics: ``set=metric`` strings.
        items: ``set=N`` strings: the number of items behind a total without standard error.
        out: score file to write.
        overwrite: replace a score file that is there.

    Raises:
        UsageError: a file is none of theirs, or models were asked other sets or items.
    """
    from ktmerge.eval.imports import joining

    if not files:
        raise UsageError("nothing to join: name at least one result or sample file.")
    models: dict[str, list[Path]] = {}
    for text in files:
        name, equals, path = text.partition("=")
        where = Path(path if equals else text)
        models.setdefault(name if equals else joining.model_name(where), []).append(where)
    if out is not None:
        refuse_existing(Path(out), overwrite)
    counts = {name: value for name, value in _pairs(items, "--items").items() if value.isdecimal() and int(value) > 0}
    if len(counts) < len(items):
        raise UsageError(f"--items {' '.join(items)}: write set=N, with N of at least 1.")
    results = joining.import_scores(
        models, base=base or ("base" if "base" in models else next(iter(models))), upstream=upstream,
        downstream=downstream, metrics=_pairs(metrics, "--metric"),
        items={name: int(value) for name, value in counts.items()},
    )  # fmt: skip
    if out is not None:
        results.save(Path(out), overwrite=overwrite)
    return results


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {text}: write set=value.")
        found[name] = value
    return found


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
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    recipes: Iterable[str | Path] = (),
    title: str | None = None,
    layers: bool = False,
    markdown: str | Path | None = None,
    csv: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write a self-contained HTML page on one or more runs; return its path.

    Args:
        runs: score files, or folders of `run`; several must have the same base, scored on the same sets.
        out: the page.
        recipes: files to print in it; those of blends whose folders are there stand in it by themselves.
        title: headline.
        layers: draw how far each layer of every model moved; reads the weights of all that are there.
        markdown: write tables for a model card here, too.
        csv: write every score here, too.
        overwrite: replace files that are there.
        progress: where to report to.

    Raises:
        UsageError: a run that is none, runs that do not compare, or a file exists.
        KtmergeError: a file cannot be written, or weights cannot be read.
    """
    from ktmerge import eval as evaluation
    from ktmerge.checkpoints.files import write_whole
    from ktmerge.eval import listing

    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    results = compare([_score_file(Path(path)) for path in paths])
    texts = {Path(path).name: text_of(Path(path)) for path in recipes}
    further = {
        Path(path): make for path, make in ((markdown, listing.markdown), (csv, listing.comma_separated)) if path
    }
    targets = [Path(out), *(Path(path) for path in (markdown, csv) if path)]
    read = {_score_file(Path(path)).resolve() for path in paths}
    for number, target in enumerate(targets):
        if target.resolve() in read | {one.resolve() for one in targets[:number]}:
            raise UsageError(f"{target}: is read or written by this report already; give every output its own name.")
        refuse_existing(target, overwrite)
    page = evaluation.render(
        results, recipes=texts, title=title, layers=_layers(results, progress) if layers else None,
        commands=_again(results), training=_losses(results),
    )  # fmt: skip
    written = {Path(out): page, **{target: make(results) for target, make in further.items()}}
    for target, text in written.items():
        write_whole(target, text, replace=overwrite)
    return Path(out)


def _score_file(run: Path) -> Path:
    """The score file of a run's folder; any other path as it is."""
    if not run.is_dir():
        return run
    if not (run / "scores.json").is_file():
        blend = next((folder for folder in (run / "blended", run) if (folder / "ktmerge.lock.yaml").is_file()), None)
        if blend is None:
            raise UsageError(
                f"{run}: has no scores.json; give a score file of 'ktmerge eval' or a folder of 'ktmerge run'."
            )
        command = f"ktmerge eval {shlex.quote(str(blend))} --base BASE --suite SUITE --out scores.json"
        raise UsageError(
            f"{run}: was blended, but not scored yet, so that there is nothing to report; go on with 'ktmerge run "
            f"--resume', or score it: {command}"
        )
    return run / "scores.json"


def _last_names(model: str) -> str:
    """A model's path without what is before its last name; ``model+adapter`` is two."""
    parts = [model] if Path(model).is_dir() else model.split("+")
    return "+".join(Path(part).name for part in parts)


def _layers(results: Results, progress: Progress) -> dict[str, str]:
    """A drawing of how far every model moved whose weights are there; none if the base's are not."""
    from ktmerge.merge.diagnostics.inspecting import inspect
    from ktmerge.merge.diagnostics.picture import heat_map

    base = results.models[results.base].path
    folders = {name: one.path for name, one in results.models.items() if name != results.base}
    there = {name: path for name, path in folders.items() if Path(path).is_dir()}
    if not Path(base).is_dir() or not there:
        raise UsageError("--layers reads weights, and the folders of the base and the models are not there any more.")
    found = inspect(base, there, progress=progress)
    drawing = heat_map(found, Path("layers.svg"))
    return {", ".join(there): drawing.decode()}


def _losses(results: Results) -> dict[str, list[dict[str, Any]]]:
    """What was logged while the models were tuned, of those that were and whose folders are there."""
    from ktmerge.pipeline import training_log

    folders = {name: Path(one.path) for name, one in results.models.items() if name != results.base}
    tuned = {name: folder for name, folder in folders.items() if not (folder / "ktmerge.lock.yaml").exists()}
    return {name: log for name, folder in tuned.items() if (log := training_log(folder))}


def _again(results: Results) -> list[str]:
    """The commands that blend what has a lock, and score all of it again; folders by their last names."""
    folders = {name: shlex.quote(_last_names(one.path)) for name, one in results.models.items()}
    blends = [
        f"ktmerge blend --recipe {folders[name]}.yaml --lock {folders[name]}.lock.yaml --out {folders[name]}"
        for name, one in results.models.items()
        if (Path(one.path) / "ktmerge.lock.yaml").is_file()
    ]
    models = " ".join(f"{shlex.quote(name)}={folders[name]}" for name in results.models if name != results.base)
    suite = shlex.quote(f"{results.suite}.yaml")
    return [*blends, f"ktmerge eval {models} --base {folders[results.base]} --suite {suite} --out scores.json"]
