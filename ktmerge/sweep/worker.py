"""The work of one worker on a sweep: screen candidates, score the best on everything, report the chosen one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from ktmerge.errors import KtmergeError
from ktmerge.eval.sets import TaskSet, read_sets
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Blend, Recipe
from ktmerge.recipes.suites import Side
from ktmerge.sweep.candidates import RECIPE, ROUND, STOPPED, Candidate, best_keeping, finalists
from ktmerge.sweep.divergence import Teachers
from ktmerge.sweep.ledger import ERROR, Ledger, open_storage
from ktmerge.sweep.live import LiveModel
from ktmerge.sweep.outcome import Final, Outcome, choose
from ktmerge.sweep.rounds import ItemScores, Round, joined
from ktmerge.sweep.sampling import distributions, make_sampler, quietly
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.space import Space, told
from ktmerge.sweep.standing import objectives, stopped

if TYPE_CHECKING:
    from optuna import Trial

_QUARTERS = (0.25, 0.5, 1.0)
"""Shares of the screening items after which a candidate is looked at."""


def search(settings: SweepSettings, progress: Progress = SILENT) -> Outcome:
    """Take part in a sweep until it is done: alone, or with any number of other workers on the same storage.

    Raises:
        UsageError: something is wrong with recipe, ranges, suites or storage; all is checked before a model is loaded.
        KtmergeError: no candidate could be blended and scored, or scoring failed.
    """
    return Worker(settings, progress).run()


def study_name(settings: SweepSettings, progress: Progress = SILENT) -> str:
    """The name of the sweep's study: equal for equal settings, models and data, wherever they lie."""
    sets = [one.digest for suite, part in _suites(settings) for one in read_sets(suite, part)]
    return f"{settings.recipe.name}-{settings.digest(sets, progress)[:16]}"


def _suites(settings: SweepSettings) -> list[tuple[Any, str | None]]:
    return [(settings.suite, settings.parts[0]), (settings.held_out, settings.parts[1])]


class Worker:
    """One process of a sweep, with one loaded model.

    Raises:
        UsageError: as for `search`.
    """

    def __init__(self, settings: SweepSettings, progress: Progress = SILENT) -> None:
        quietly()
        self._settings, self._progress = settings, progress
        self._space = Space(settings.recipe, settings.ranges, settings.methods)
        self._selection, self._held_out = (read_sets(suite, part) for suite, part in _suites(settings))
        self._sampler = settings.sampler
        if self._sampler == "auto":
            self._sampler = "nsga2" if self._space.knob is None or settings.screen == "divergence" else "curve"
        name = study_name(settings, progress)
        self._storage = open_storage(settings.storage)
        self._ranges = distributions(self._space)
        self._ledger = Ledger(self._storage, name, settings.grace)
        begun = len(self._ledger.study.get_trials(deepcopy=False))
        self._ledger.study.sampler = make_sampler(self._sampler, self._space, settings.limit, settings.seed, begun)
        self._tasks = Ledger(self._storage, f"{name}-tasks", settings.grace)
        self._live = LiveModel(
            settings.recipe, settings.device, settings.batch_size, settings.gigabytes, progress
        )  # fmt: skip
        self._rounds = self._live.cut(self._selection, _ends(settings))
        self._screens = self._rounds if settings.screen == "full" or settings.share == 1 else self._rounds[:-1]
        self._sides: dict[str, Side] = {one.task.name: one.side for one in self._selection}
        self._teachers: Teachers | None = None
        self._base: list[ItemScores] = []

    def run(self) -> Outcome:
        """Work until the sweep is done."""
        settings = self._settings
        whole = self._tasks.share({"base": partial(self._score_all, "base", None)})
        self._base = whole["base"]
        objectives(joined(self._base), joined(self._base), self._sides)  # refuses a base with nothing to keep
        if self._sampler == "grid":
            self._tasks.share({f"grid of {settings.trials}": self._queue_grid})
        while (trial := self._ledger.begin(settings.trials, self._ranges)) is not None:
            with self._ledger.working(trial):
                self._screen(trial)
        candidates = self._candidates()
        if not candidates:
            reasons = [str(one.user_attrs[ERROR]) for one in self._ledger.trials() if ERROR in one.user_attrs]
            raise KtmergeError("no candidate could be blended and scored: " + (reasons[0] if reasons else "no trials."))
        finals = self._finals(candidates)
        chosen, nearest = choose(finals, settings.limit)
        shown = chosen or nearest
        held_out = self._report(shown)
        return Outcome(
            settings=settings,
            sampler=self._sampler,
            study=self._ledger.study.study_name,
            candidates=candidates,
            failed={one.number: str(one.user_attrs[ERROR]) for one in self._ledger.trials() if ERROR in one.user_attrs},
            finals=finals,
            base=joined(self._base),
            sides=self._sides,
            chosen=chosen,
            nearest=nearest,
            held_out=held_out,
        )

    def _screen(self, trial: Trial) -> None:
        """Blend and score one candidate, as far as it takes."""
        try:
            recipe = self._space.recipe_at(trial.params)
            trial.set_user_attr(RECIPE, _plain(recipe))
            values = self._values(trial, recipe)
        except KtmergeError as error:
            self._ledger.fail(trial, str(error))
            self._progress.note(f"trial {trial.number}, {told(trial.params)}: {error}")
            return
        if self._settings.screen != "divergence":
            trial.set_constraint("upstream", self._settings.limit - values[0])
        self._ledger.finish(trial, values)
        reason = trial.user_attrs.get(STOPPED)
        self._progress.note(
            f"trial {trial.number}, {told(trial.params)}: {_said(values, self._settings.screen)}"
            + (f"; stopped: {reason}" if reason else "")
        )

    def _values(self, trial: Trial, recipe: Recipe) -> tuple[float, float]:
        twin = next((one for one in self._candidates() if one.recipe == _plain(recipe)), None)
        if twin is not None:
            for i, scores in enumerate(twin.rounds):
                trial.set_user_attr(f"{ROUND} {i}", scores)
            if twin.stopped:
                trial.set_user_attr(STOPPED, twin.stopped)
            return twin.first, twin.second
        label = f"trial {trial.number}"
        if self._settings.screen == "divergence":
            teachers = self._made_teachers()
            self._live.blend(recipe)
            up, down = teachers.distances(self._live.model)
            return -up, -down
        blended = False
        own: list[ItemScores] = []
        for i, one in enumerate(self._screens):
            known = trial.user_attrs.get(f"{ROUND} {i}")  # a dead worker scored it
            if known is None:
                if not blended:
                    self._live.blend(recipe)
                    blended = True
                known = self._live.score(one, label)
                trial.set_user_attr(f"{ROUND} {i}", known)
            own.append(known)
            if i + 1 < len(self._screens) and (reason := self._stops(own)) is not None:
                trial.set_user_attr(STOPPED, reason)
                break
        return objectives(joined(own), joined(self._base), self._sides)

    def _stops(self, own: list[ItemScores]) -> str | None:
        best = best_keeping(self._candidates(), self._settings.limit)
        return stopped(
            joined(own), joined(self._base), None if best is None else best.scores, self._sides, self._settings.keep,
            len(self._screens) - 1,
        )  # fmt: skip

    def _finals(self, candidates: list[Candidate]) -> list[Final]:
        """The best candidates, scored on all selection items."""
        settings = self._settings
        limit = None if settings.screen == "divergence" else settings.limit
        chosen = finalists(candidates, settings.finalists, limit)
        made = self._tasks.share({f"final {one.number}": partial(self._finish, one) for one in chosen})
        base = joined(self._base)
        found = []
        for one in chosen:
            result = made[f"final {one.number}"]
            scores = joined(result["rounds"])
            found.append(Final(one, scores, *objectives(scores, base, self._sides), result["digest"]))
        return found

    def _finish(self, one: Candidate) -> dict[str, Any]:
        recipe = self._recipe(one)
        self._live.blend(recipe)
        label = f"final, trial {one.number}"
        rounds = [*one.rounds, *(self._live.score(left, label) for left in self._rounds[len(one.rounds) :])]
        self._progress.note(f"{label}, {told(one.point)}: {_said(self._standing(rounds), 'full')}")
        return {"rounds": rounds, "digest": self._live.digest(recipe)}

    def _standing(self, rounds: list[ItemScores]) -> tuple[float, float]:
        return objectives(joined(rounds), joined(self._base), self._sides)

    def _report(self, shown: Candidate) -> dict[str, ItemScores]:
        """Base, experts and the chosen candidate on the held-out items."""
        names = self._settings.recipe.experts
        tasks = {
            "report base": partial(self._score_held_out, "base", None),
            **{f"report expert {name}": partial(self._score_held_out, name, self._only(name)) for name in names},
            f"report {shown.number}": partial(self._score_held_out, f"trial {shown.number}", self._recipe(shown)),
        }
        made = self._tasks.share(tasks)
        return {
            "base": made["report base"],
            **{name: made[f"report expert {name}"] for name in names},
            "chosen": made[f"report {shown.number}"],
        }

    def _score_all(self, label: str, recipe: Recipe | None) -> list[ItemScores]:
        """On all rounds of the selection items."""
        self._live.blend(recipe or self._untuned())
        return [self._live.score(one, label) for one in self._rounds]

    def _score_held_out(self, label: str, recipe: Recipe | None) -> ItemScores:
        self._live.blend(recipe or self._untuned())
        return self._live.score(self._held_out_round(self._held_out), f"held out, {label}")

    def _held_out_round(self, sets: list[TaskSet]) -> Round:
        return self._live.cut(sets, [1.0])[0]

    def _untuned(self) -> Recipe:
        """The base, as a blend that keeps nothing of an expert."""
        name = next(iter(self._settings.recipe.experts))
        return self._only(name, 0.0)

    def _only(self, name: str, lambda_: float = 1.0) -> Recipe:
        """One expert as it is."""
        recipe = self._settings.recipe
        expert = recipe.experts[name].model_copy(update={"weight": 1.0})
        blend = Blend.model_validate({"method": "linear", "lambda": lambda_})
        return recipe.model_copy(update={"experts": {name: expert}, "blend": blend, "finetune": None})

    def _recipe(self, one: Candidate) -> Recipe:
        recipe = self._settings.recipe
        return parse_recipe(one.recipe, f"{recipe.name}, trial {one.number}", recipe.folder)

    def _candidates(self) -> list[Candidate]:
        return [Candidate.of(one) for one in self._ledger.trials(TrialState.COMPLETE)]

    def _queue_grid(self) -> int:
        """Put the points of the grid that were not tried yet into the queue; how many there are."""
        points = self._space.grid(self._settings.trials)
        there = [one.params for one in self._ledger.trials()]
        for point in points:
            if point not in there:
                self._ledger.add(point, self._ranges)
        return len(points)

    def _made_teachers(self) -> Teachers:
        if self._teachers is None:
            experts = {name: self._live.copy_of(self._only(name)) for name in self._settings.recipe.experts}
            base = self._live.copy_of(self._untuned())
            self._teachers = Teachers(base, experts, self._screens[0], self._live.tokenizer)
        return self._teachers


def _ends(settings: SweepSettings) -> list[float]:
    """The shares of the selection items at which rounds end."""
    if settings.screen == "full":
        return list(_QUARTERS)
    if settings.screen == "divergence":
        return [settings.share, 1.0] if settings.share < 1 else [1.0]
    return [*(settings.share * part for part in _QUARTERS), *([1.0] if settings.share < 1 else [])]


def _plain(recipe: Recipe) -> dict[str, Any]:
    document = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"finetune", "eval"})
    return {"ktmerge": recipe.ktmerge, **document}


def _said(values: tuple[float, float], screen: str) -> str:
    if screen == "divergence":
        return f"KL to the base {-values[0]:.4f}, to the experts {-values[1]:.4f}"
    return f"keeps {values[0]:.1f} %, gains {values[1]:+.1f}"
