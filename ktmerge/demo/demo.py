"""The embedded default: the whole job on a small real model, from nothing to a report. Only puts the steps in order.

Every step keeps what is already there and belongs to the same inputs, so that a stopped run goes on when it is started
again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.checkpoints.files import clear_os_errors, write_whole
from ktmerge.demo import page
from ktmerge.demo.data import write_data
from ktmerge.demo.model import NAME, base_model
from ktmerge.demo.selection import Selection, at, rewrite, select
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.load import load_recipe, load_suite
from ktmerge.recipes.schema import Recipe
from ktmerge.recipes.suites import Suite

if TYPE_CHECKING:
    from ktmerge.eval import Results

MARK = ".ktmerge-demo"
WHOLE = "everything"
BLENDS: dict[str, Sequence[float]] = {
    "verdicts-back": (0.4, 0.6, 0.8),
    "languages-back": (0.4, 0.6, 0.8),
    "together-sum": (0.4, 0.6, 0.8),
    "together-ties": (0.6, 0.8, 1.0),
}
"""Recipes of the demo, and the coefficients that are tried for each."""

SPACE = 6_000_000_000  # bytes under the output folder at the peak: an optimiser's state beside two experts


@dataclass(frozen=True)
class _Size:
    """How much is done: the demo's own size, or the few steps and items of a quick look at whether all works."""

    overrides: tuple[str, ...] = ()
    limit: int | None = None
    blends: Mapping[str, Sequence[float]] | None = None


_QUICK = _Size(
    overrides=tuple(
        f"finetune.experts.{name}.{key}" for name in ("verdicts", "languages") for key in ("max_steps=2", "warmup=1")
    ),
    limit=4,
    blends={name: values[-1:] for name, values in BLENDS.items()},
)


def run_demo(out: Path, *, progress: Progress = SILENT, quick: bool = False) -> Path:
    """Do the whole job under ``out``; return the path of ``report.html``.

    Two full fine-tunes of a small model, four blends, all scores. Leaves the data, recipes and suites as files to copy
    from, the experts, the blended checkpoints, ``scores.json`` and the report.

    Args:
        out: the folder; one that an earlier run began is gone on with.
        progress: told what happens and how long it took.
        quick: a few steps and items only, to see that everything works; the scores then mean nothing.

    Raises:
        UsageError: ``out`` holds something else.
        KtmergeError: no connection for the first download, no space, or a step failed.
    """
    size = _QUICK if quick else _Size()
    cache, clock = cache_folder(), _Clock(progress)
    _take(out)
    with clock.step(f"base model: {NAME}"):
        base = base_model(cache, progress)
        _link(out / "base", base)
    with clock.step("data: four upstream sets, two tasks to learn"):
        write_data(out / "data", cache, progress)
        texts = _write_recipes(out)
    with clock.step("two full fine-tunes, about two minutes each"):
        experts = _make_experts(out, size, progress)
    suites = {split: _suite(out, split, size) for split in ("select", "report")}
    with clock.step("the blend coefficients, chosen on the selection split"):
        recipes = {name: load_recipe(out / "recipes" / f"{name}.yaml") for name in BLENDS}
        chosen = select(recipes, size.blends or BLENDS, suites["select"], base, out / "selection.json", progress)
    with clock.step("blended checkpoints"):
        blends = {name: _blend(out, name, recipes[name], texts, chosen[name], progress) for name in BLENDS}
    models = {"base": base, **experts, **blends}
    with clock.step(f"scores of {len(models)} models on the report split"):
        results = _score(out, models, suites["report"], progress)
    with clock.step("side-by-side answers, report"):
        answers = page.answers(out, results, {"base": base, **experts, **page.showcase(blends, chosen)}, progress)
        return page.report(out, results, experts, texts, chosen, answers)


class _Clock:
    """Says which step begins, and how long it took."""

    STEPS = 7

    def __init__(self, progress: Progress) -> None:
        self._progress, self._number, self._began = progress, 0, time.monotonic()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._number += 1
        self._progress.note(f"[{self._number}/{self.STEPS}] {title}")
        started = time.monotonic()
        yield
        now = time.monotonic()
        self._progress.note(f"      {now - started:.0f} s; {_minutes(now - self._began)} since the start")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _take(out: Path) -> None:
    """Make the folder the demo's, or find that it is."""
    with clear_os_errors(out):
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out}: is a file; give the demo a folder of its own.")
        if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
            raise UsageError(f"{out}: holds something else than a demo; give it a folder of its own.")
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if free < SPACE and not (out / "experts" / "languages").is_dir():
            raise KtmergeError(
                f"{out}: the demo needs {SPACE / 1e9:.0f} GB on that disk, {free / 1e9:.1f} GB are free."
            )
        (out / MARK).touch()


def _link(link: Path, target: Path) -> None:
    """Point ``base`` in the demo's folder at the cached model, so that the recipes there can name it."""
    with clear_os_errors(link):
        if link.is_symlink() and Path(os.readlink(link)) == target:
            return
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)


def _write_recipes(out: Path) -> dict[str, str]:
    """Write recipes and suites; return the recipes' texts by name."""
    source = files("ktmerge.demo") / "recipes"
    texts = {name: (source / f"{name}.yaml").read_text(encoding="utf-8") for name in (WHOLE, *BLENDS)}
    suite = (source / "suite.yaml").read_text(encoding="utf-8")
    for folder in ("recipes", "suites"):
        (out / folder).mkdir(exist_ok=True)
    for name, text in texts.items():
        write_whole(out / "recipes" / f"{name}.yaml", text)
    write_whole(out / "suites" / "report.yaml", suite)
    selecting = suite.replace("data/report/", "data/select/").replace("demo-report", "demo-select")
    write_whole(out / "suites" / "select.yaml", selecting)
    return texts


def _make_experts(out: Path, size: _Size, progress: Progress) -> dict[str, Path]:
    from ktmerge.staging import jobs_of

    jobs = jobs_of(load_recipe(out / "recipes" / f"{WHOLE}.yaml", overrides=size.overrides))
    for job in jobs:
        job.run(resume=True, overwrite=True, progress=progress)
    return {job.name: job.out for job in jobs}


def _suite(out: Path, split: str, size: _Size) -> Suite:
    suite = load_suite(out / "suites" / f"{split}.yaml")
    if size.limit is None:
        return suite
    fewer = {
        side: [task.model_copy(update={"limit": size.limit}) for task in getattr(suite, side)]
        for side in ("upstream", "downstream")
    }
    return suite.model_copy(update=fewer)


def _blend(
    out: Path, name: str, recipe: Recipe, texts: dict[str, str], selection: Selection, progress: Progress
) -> Path:
    """Write the blend at its chosen coefficient, and that coefficient into its recipe."""
    from ktmerge.pipeline import make_blend

    coefficient = selection.shown
    texts[name] = rewrite(texts[name], coefficient)
    write_whole(out / "recipes" / f"{name}.yaml", texts[name])
    progress.note(f"{name}: lambda {coefficient:g}")
    return make_blend(at(recipe, coefficient), out / "blends" / name, progress=progress)


def _score(out: Path, models: Mapping[str, Path], suite: Suite, progress: Progress) -> Results:
    """Score the models unless ``scores.json`` already holds these weights on these items."""
    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.eval import Results, evaluate, read_sets
    from ktmerge.eval.sets import suite_digest

    path = out / "scores.json"
    if path.exists():
        try:
            kept = Results.load(path)
        except UsageError:
            kept = None
        if kept is not None and kept.suite_digest == suite_digest([one.digest for one in read_sets(suite)]):
            digests = {name: Checkpoint.open(model).content_digest(progress) for name, model in models.items()}
            if {name: info.digest for name, info in kept.models.items()} == digests:
                progress.note(f"{path.name}: already holds the scores of these models; kept")
                return kept
    results = evaluate(models, suite, progress=progress)
    results.save(path)
    return results
