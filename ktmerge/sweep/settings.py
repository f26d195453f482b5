"""What a sweep is asked to do. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.digests import digest_of, input_files
from ktmerge.checkpoints.opening import open_model
from ktmerge.checkpoints.statistics import RECORD
from ktmerge.errors import UsageError, did_you_mean
from ktmerge.eval.statistics import without_dust
from ktmerge.merge.kernels.keys import SCHEME
from ktmerge.merge.registry import find_method
from ktmerge.progress import Progress
from ktmerge.recipes.schema import Recipe
from ktmerge.recipes.suites import Suite
from ktmerge.sweep.space import Range

Sampler = Literal["auto", "nsga2", "tpe", "gp", "grid", "qmc", "curve", "greedy"]
Screen = Literal["subset", "divergence", "full"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
SCREENS: tuple[Screen, ...] = get_args(Screen)

_VERSION = 5
"""Raise when the same settings would search otherwise."""


@dataclass(frozen=True)
class SweepSettings:
    """A sweep.

    Attributes:
        recipe: what is not turned.
        ranges: what is.
        methods: tried each; empty: the recipe's.
        suite: what candidates are chosen on.
        held_out: what the chosen one is reported on.
        parts: which rows of the two suites.
        storage: a database's URL, or the path of a journal file.
        keep: least upstream score, as a share of the base's; None: no limit, which greedy soups can do without.
        gain: share of the experts' downstream gain that counts as the goal reached; it decides no choice.
        trials: candidates in all, whoever scores them.
        sampler: how candidates are drawn; auto: curve for a single knob, nsga2 else. Greedy: experts are added one by
            one instead.
        screen: how all candidates are scored before the best are scored on everything: on a subset of the items, by
            their divergence from base and experts, or on all items.
        share: of the selection items that the subset holds.
        finalists: most candidates that are scored on everything.
        seed: of the sampler.
        seeds: of each candidate's random choices, over which its scores are averaged; the first is the recipe's, and
            what is reported and written has that one.
        grace: seconds without a sign of life after which a worker elsewhere counts as dead.
        device: where models are scored and blended.
        gigabytes: most decompositions kept on disk.
        batch_size: most sequences in a forward pass; by default what fits.
        bootstrap: resamples behind each interval.
        bootstrap_seed: of the resamples.
    """

    recipe: Recipe
    ranges: tuple[Range, ...]
    methods: tuple[str, ...]
    suite: Suite
    held_out: Suite
    parts: tuple[str | None, str | None]
    storage: str
    keep: float | None = 0.99
    gain: float = 0.9
    trials: int = 60
    sampler: Sampler = "auto"
    screen: Screen = "subset"
    share: float = 0.5
    finalists: int = 8
    seed: int = 0
    seeds: int = 1
    grace: float = 60.0
    device: str = "auto"
    gigabytes: float = 8.0
    batch_size: int | None = None
    bootstrap: int = 2000
    bootstrap_seed: int = 0

    def __post_init__(self) -> None:
        for what, value, valid in (
            ("sampler", self.sampler, SAMPLERS),
            ("screen", self.screen, SCREENS),
        ):
            if value not in valid:
                raise UsageError(f"--{what} {value}: there is no such {what}.{did_you_mean(value, valid)}")
        for what, wrong, wanted in (
            (
                "keep-upstream",
                self.keep is not None and not 0 < self.keep <= 2,
                "a share of the base's score, such as 0.99",
            ),
            ("gain-share", not 0 < self.gain <= 2, "a share of the experts' gain, such as 0.9"),
            ("trials", self.trials < 1, "1 or more"),
            ("share", not 0 < self.share <= 1, "above 0 and at most 1"),
            ("finalists", self.finalists < 1, "1 or more"),
            ("seeds", self.seeds < 1, "1 or more"),
            ("seed", self.seed < 0, "0 or more"),
            ("grace", not self.grace > 0, "seconds, above 0"),
            ("gigabytes", not self.gigabytes >= 0, "0 or more"),
        ):
            if wrong:
                raise UsageError(f"--{what}: must be {wanted}.")
        if self.sampler == "greedy" and self.ranges:
            raise UsageError(
                f"--range {self.ranges[0].key}: a greedy soup turns no numbers, it adds experts; leave it out, or "
                "choose another --sampler."
            )
        if self.sampler == "greedy" and self.screen != "full":
            raise UsageError(f"--screen {self.screen}: a greedy soup is decided on all selection items; leave it out.")
        for suite in (self.suite, self.held_out):
            if not (suite.upstream and suite.downstream):
                raise UsageError(f"the suite '{suite.name}' needs upstream and downstream tasks; a sweep weighs both.")
        names, others = (
            [[one.name for one in side] for side in (suite.upstream, suite.downstream)]
            for suite in (self.suite, self.held_out)
        )
        if names != others:
            raise UsageError(
                f"the suites '{self.suite.name}' and '{self.held_out.name}' need the same tasks, by name and side."
            )

    @property
    def limit(self) -> float:
        """Least upstream retention, in percent; minus infinity: none."""
        return -math.inf if self.keep is None else without_dust(100 * self.keep)

    @property
    def wanted_gain(self) -> float:
        """Share of the experts' gain that counts as the goal reached, in percent."""
        return without_dust(100 * self.gain)

    def digest(self, sets: Sequence[str], progress: Progress) -> str:
        """sha256 over all that decides what is found, but for how many trials: a sweep may be given more.

        Args:
            sets: digests of all sets.
            progress: where to report to while weights are read.
        """
        recipe = self.recipe
        base = open_model(str(recipe.base), recipe.folder)
        models = {name: open_model(expert.model, recipe.folder, base) for name, expert in recipe.experts.items()}
        weights = {name: (recipe.experts[name].weight, _files(one, name, progress)) for name, one in models.items()}
        apart = {"finetune", "eval", "base", "experts", "statistics"}
        document = recipe.model_dump(mode="json", by_alias=True, exclude=apart)
        written: list[Any] = [
            _VERSION, SCHEME, self._semantics(), document, _files(base, "base", progress), weights, _measured(recipe),
            list(sets), [repr(one) for one in self.ranges], list(self.methods), self.keep, self.sampler, self.screen,
            self.share, self.finalists, self.seed, self.seeds,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()

    def _semantics(self) -> dict[str, int]:
        """Of all methods; raised where the same recipe would give other bytes than it gave."""
        blend = self.recipe.blend
        rules = blend.where if blend is not None else []
        names = {*self.methods, blend.method if blend is not None else None, *(rule.method for rule in rules)}
        return {name: find_method(name).semantics for name in names if name is not None}


def journal(folder: Path) -> str:
    """Where a sweep's trials are kept unless a database is named."""
    return str(folder / "journal.log")


def _measured(recipe: Recipe) -> dict[str, str]:
    """sha256 of the record of all statistics that are there, which has those of their other files."""
    folders = {name: recipe.statistics_folder(name) for name in ("base", *recipe.experts)}
    records = {name: folder / RECORD for name, folder in folders.items() if folder is not None}
    return {name: digest_of(record).sha256 for name, record in records.items() if record.is_file()}


def _files(checkpoint: Checkpoint, name: str, progress: Progress) -> list[str]:
    """sha256 of the files that decide what a model is, from memory if they were read before."""
    files = input_files(checkpoint)
    sizes = {path: path.stat().st_size for path in files.values()}
    found = []
    with progress.task(f"hash {name}", sum(sizes.values()), "bytes") as step:
        for path, size in sizes.items():
            found.append(digest_of(path).sha256)
            step.advance(size)
    return found
