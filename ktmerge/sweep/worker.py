"""The work of one worker on a sweep: screen candidates, score the best on everything, report the chosen one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval.sets import TaskSet
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Recipe
from ktmerge.sweep.anchors import base_alone, expert_alone
from ktmerge.sweep.candidates import Candidate, Final, choose, finalists
from ktmerge.sweep.greedy import Walk
from ktmerge.sweep.halves import read_halves
from ktmerge.sweep.ledger import ERROR, Ledger
from ktmerge.sweep.live import LiveModel
from ktmerge.sweep.outcome import SHOWN, Outcome
from ktmerge.sweep.rounds import ItemScores, joined, scored_sets
from ktmerge.sweep.sampling import distributions, make_sampler, quietly
from ktmerge.sweep.screening import Screening, candidates_of, said
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.soupoutcome import SoupOutcome, choose_soup, walk_of
from ktmerge.sweep.soups import Soups
from ktmerge.sweep.space import Point, Space, told
from ktmerge.sweep.standing import objectives
from ktmerge.sweep.storage import open_storage

_QUARTERS = (0.25, 0.5, 1.0)
"""Shares of the screening items after which a candidate is looked at."""


def search(settings: SweepSettings, progress: Progress = SILENT) -> Outcome:
    """Take part in a sweep until it is done: alone, or with any number of other workers on the same storage.

    Raises:
        UsageError: something is wrong with recipe, ranges, suites or storage; all is checked before a model is loaded.
        KtmergeError: no candidate could be blended and scored, or scoring failed.
    """
    return Worker(settings, progress).run()


def study_name(settings: SweepSettings, sets: Iterable[TaskSet], progress: Progress = SILENT) -> str:
    """The name of the sweep's study: equal for equal settings, models and data, wherever they lie."""
    return f"{settings.recipe.name}-{settings.digest([one.digest for one in sets], progress)[:16]}"


def space_of(settings: SweepSettings) -> Space:
    """What a sweep turns.

    Raises:
        UsageError: a range or a method is wrong, there is nothing to turn, or the sampler cannot.
    """
    if settings.sampler == "greedy":
        return Soups(settings.recipe, settings.methods)
    space = Space(settings.recipe, settings.ranges, settings.methods)
    if settings.sampler == "curve" and space.knob is None:
        raise UsageError(
            "--sampler curve: it follows a single number; give one --range low:high and one method, or choose another "
            "sampler."
        )
    if settings.sampler == "grid":
        space.grid(settings.trials)
    return space


class Worker:
    """One process of a sweep, with one loaded model.

    Raises:
        UsageError: as for `search`.
    """

    def __init__(self, settings: SweepSettings, progress: Progress = SILENT) -> None:
        quietly()
        self._settings, self._progress = settings, progress
        self._space = space_of(settings)
        selection, held_out = read_halves(settings)
        self._sampler = settings.sampler
        if self._sampler == "auto":
            self._sampler = "nsga2" if self._space.knob is None or settings.screen == "divergence" else "curve"
        name = study_name(settings, [*selection, *held_out], progress)
        storage = open_storage(settings.storage)
        self._ranges = distributions(self._space)
        self._ledger = Ledger(storage, name, settings.grace)
        self._ledger.study.sampler = make_sampler(self._sampler, self._space, settings.limit, settings.seed)
        self._tasks = Ledger(storage, f"{name}-tasks", settings.grace)
        self._live = LiveModel(settings.recipe, settings.device, settings.batch_size, settings.gigabytes, progress)
        self._rounds = self._live.cut(selection, _ends(settings))
        self._held_out = self._live.cut(held_out, [1.0])  # before hours of work, not after
        self._sets = scored_sets(self._rounds)
        self._base: ItemScores = {}

    def run(self) -> Outcome:
        """Work until the sweep is done."""
        settings = self._settings
        whole = self._tasks.share({"base": partial(self._score_all, "base", base_alone(settings.recipe))})
        self._base = joined(whole["base"])
        objectives(self._base, self._base, self._sets)  # refuses a base with nothing to keep
        if isinstance(self._space, Soups):
            self._add_greedily(self._space)
        elif self._sampler == "grid":
            self._tasks.share({f"grid of {settings.trials}": partial(self._queue, self._space.grid(settings.trials))})
            self._screen(None)
        else:
            self._screen(settings.trials)
        candidates = candidates_of(self._ledger)
        failed = {one.number: str(one.user_attrs[ERROR]) for one in self._ledger.trials() if ERROR in one.user_attrs}
        if not candidates:
            reason = next(iter(failed.values()), "no trials.")
            raise KtmergeError(f"no candidate could be blended and scored: {reason}")
        finals = self._finals(candidates)
        chosen, nearest = self._choose(finals)
        outcome = Outcome(
            settings=settings,
            sampler=self._sampler,
            study=self._ledger.study.study_name,
            candidates=candidates,
            failed=failed,
            finals=finals,
            base=self._base,
            sets=self._sets,
            chosen=chosen,
            nearest=nearest,
            held_out=self._report(chosen or nearest),
            held_out_sets=scored_sets(self._held_out),
        )
        return SoupOutcome.of(outcome, self._walk()) if self._sampler == "greedy" else outcome

    def _screen(self, most: int | None) -> None:
        """Take part until so many candidates are screened, or those in the queue."""
        settings = self._settings
        rounds = self._rounds if settings.screen == "full" or settings.share == 1 else self._rounds[:-1]
        screening = Screening(
            settings, self._space, self._ledger, self._live, rounds, self._base, self._sets, self._progress
        )
        while (trial := self._ledger.begin(most, self._ranges)) is not None:
            with suppress(UpdateFinishedTrialError), self._ledger.working(trial):  # taken for dead: another does it
                screening.screen(trial)

    def _queue(self, points: Sequence[Point]) -> int:
        """Put points that were not tried yet into the queue; how many there are."""
        there = [one.params for one in self._ledger.trials()]
        for point in points:
            if point not in there:
                self._ledger.add(point, self._ranges)
        return len(points)

    def _add_greedily(self, soups: Soups) -> None:
        """Score the experts, then one soup after another, as long as one is wanted."""
        decided = 0
        while True:
            self._screen(None)
            walk = self._walk()
            for step in walk.steps[decided:]:
                self._progress.note(f"{step.expert}: {'kept' if step.kept else 'left out'}")
            decided = len(walk.steps)
            if not walk.wanted:
                return
            points = [soups.point_of(members) for members in walk.wanted]
            self._tasks.share({f"soups {points}": partial(self._queue, points)})

    def _walk(self) -> Walk:
        failed = [one.params for one in self._ledger.trials() if ERROR in one.user_attrs]
        return walk_of(self._settings, candidates_of(self._ledger), failed, self._base, self._sets)

    def _choose(self, finals: list[Final]) -> tuple[Candidate | None, Candidate]:
        if self._sampler == "greedy":
            return choose_soup(finals, self._walk().soup, self._settings.limit)
        return choose(finals, self._settings.limit)

    def _finals(self, candidates: list[Candidate]) -> list[Final]:
        """The best candidates, scored on all selection items; of soups, which are already, all."""
        settings = self._settings
        most = len(candidates) if self._sampler == "greedy" else settings.finalists
        chosen = finalists(candidates, most, None if settings.screen == "divergence" else settings.limit)
        made = self._tasks.share({f"final {one.number}": partial(self._finish, one) for one in chosen})
        found = []
        for one in chosen:
            result = made[f"final {one.number}"]
            scores = joined(result["rounds"])
            values = objectives(scores, self._base, self._sets)
            found.append(Final(one, scores, *values, result["digest"], result.get("left out", ())))
        return found

    def _finish(self, one: Candidate) -> dict[str, Any]:
        recipe = self._recipe(one)
        label = f"final, trial {one.number}"
        left = self._rounds[len(one.rounds) :]
        rounds = [*one.rounds, *(self._live.score_blend(recipe, more, label, self._settings.seeds) for more in left)]
        if left:
            values = objectives(joined(rounds), self._base, self._sets)
            self._progress.note(f"{label}, {told(one.point)}: {said(values, 'full')}")
        digest, left_out = self._live.digest(recipe)
        return {"rounds": rounds, "digest": digest, "left out": left_out}

    def _report(self, shown: Candidate) -> dict[str, ItemScores]:
        """Base, experts and the chosen candidate on the held-out items."""
        recipe = self._settings.recipe
        label = f"trial {shown.number}"
        asked = {
            "base": ("report base", "base", base_alone(recipe)),
            **{name: (f"report expert {name}", name, expert_alone(recipe, name)) for name in recipe.experts},
            SHOWN: (f"report {shown.number}", label, self._recipe(shown)),
        }
        made = self._tasks.share(
            {task: partial(self._score_held_out, name, blended) for task, name, blended in asked.values()}
        )
        return {name: made[task] for name, (task, _, _) in asked.items()}

    def _score_all(self, label: str, recipe: Recipe) -> list[ItemScores]:
        """On all rounds of the selection items."""
        self._live.blend(recipe)
        return [self._live.score(one, label) for one in self._rounds]

    def _score_held_out(self, label: str, recipe: Recipe) -> ItemScores:
        self._live.blend(recipe)
        return self._live.score(self._held_out[0], f"held out, {label}")

    def _recipe(self, one: Candidate) -> Recipe:
        recipe = self._settings.recipe
        return parse_recipe(one.recipe, f"{recipe.name}, trial {one.number}", recipe.folder)


def _ends(settings: SweepSettings) -> list[float]:
    """The shares of the selection items at which rounds end."""
    if settings.screen == "full":
        return list(_QUARTERS)
    if settings.screen == "divergence":
        return [settings.share, 1.0] if settings.share < 1 else [1.0]
    return [*(settings.share * part for part in _QUARTERS), *([1.0] if settings.share < 1 else [])]
