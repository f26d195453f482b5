"""Candidates of a sweep screened: blended into the loaded model, and scored as far as it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from ktmerge.errors import KtmergeError
from ktmerge.progress import Progress
from ktmerge.recipes.schema import Recipe
from ktmerge.sweep.anchors import base_alone, expert_alone
from ktmerge.sweep.candidates import POINT, RECIPE, ROUND, STOPPED, Candidate, best_keeping
from ktmerge.sweep.divergence import Teachers
from ktmerge.sweep.ledger import Ledger
from ktmerge.sweep.live import LiveModel
from ktmerge.sweep.rounds import ItemScores, Round, Sets, joined
from ktmerge.sweep.seeds import drawn
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.space import Space, told
from ktmerge.sweep.standing import objectives, stopped

if TYPE_CHECKING:
    from optuna import Trial


@dataclass(frozen=True)
class Screening:
    """What it takes to screen.

    Attributes:
        settings: of the sweep.
        space: what is turned.
        ledger: of the candidates.
        live: the loaded model.
        rounds: items to score one after another.
        base: the base's scores.
        sets: that are scored.
        progress: where to report to.
    """

    settings: SweepSettings
    space: Space
    ledger: Ledger
    live: LiveModel
    rounds: list[Round]
    base: ItemScores
    sets: Sets
    progress: Progress

    def screen(self, trial: Trial) -> None:
        """Blend and score one candidate."""
        point = self.space.used(trial.params)
        trial.set_user_attr(POINT, point)
        try:
            recipe = self.space.recipe_at(point)
            trial.set_user_attr(RECIPE, _plain(recipe))
            values = self._values(trial, recipe)
        except KtmergeError as error:
            self.ledger.fail(trial, str(error))
            self.progress.note(f"trial {trial.number}, {told(point)}: {error}")
            return
        if self.settings.screen != "divergence" and math.isfinite(self.settings.limit):
            trial.set_constraint("upstream", self.settings.limit - values[0])
        self.ledger.finish(trial, values)
        reason = trial.user_attrs.get(STOPPED)
        self.progress.note(
            f"trial {trial.number}, {told(point)}: {said(values, self.settings.screen)}"
            + (f"; stopped: {reason}" if reason else "")
        )

    def _values(self, trial: Trial, recipe: Recipe) -> tuple[float, float]:
        plain = _plain(recipe)
        twin = next((one for one in candidates_of(self.ledger) if one.recipe == plain), None)
        if twin is not None:
            for i, scores in enumerate(twin.rounds):
                trial.set_user_attr(f"{ROUND} {i}", scores)
            if twin.stopped:
                trial.set_user_attr(STOPPED, twin.stopped)
            return twin.first, twin.second
        if self.settings.screen == "divergence":
            found = [self._distances(one) for one in drawn(recipe, self.settings.seeds)]
            up, down = (sum(values) / len(found) for values in zip(*found, strict=True))
            if not math.isfinite(up + down):
                raise KtmergeError("what it computes on some items is not finite, so that it cannot be compared.")
            return -up, -down
        return objectives(joined(self._scored(trial, recipe)), self.base, self.sets)

    def _distances(self, recipe: Recipe) -> tuple[float, float]:
        teachers = self._teachers
        self.live.blend(recipe)
        return teachers.distances(self.live.model)

    def _scored(self, trial: Trial, recipe: Recipe) -> list[ItemScores]:
        """Round after round, until it is stopped."""
        own: list[ItemScores] = []
        for i, one in enumerate(self.rounds):
            known = trial.user_attrs.get(f"{ROUND} {i}")  # a dead worker scored it
            if known is None:
                known = self.live.score_blend(recipe, one, f"trial {trial.number}", self.settings.seeds)
                trial.set_user_attr(f"{ROUND} {i}", known)
            own.append(known)
            if i + 1 < len(self.rounds) and (reason := self._stops(own)) is not None:
                trial.set_user_attr(STOPPED, reason)
                break
        return own

    def _stops(self, own: list[ItemScores]) -> str | None:
        keep = self.settings.keep
        if keep is None or self.settings.sampler == "greedy":
            return None  # a soup is compared with another on all items
        best = best_keeping(candidates_of(self.ledger), self.settings.limit)
        return stopped(
            joined(own), self.base, None if best is None else best.scores, self.sets, keep, len(self.rounds) - 1
        )

    @cached_property
    def _teachers(self) -> Teachers:
        recipe = self.settings.recipe
        experts = {name: self.live.copy_of(expert_alone(recipe, name)) for name in recipe.experts}
        return Teachers(
            self.live.copy_of(base_alone(recipe)), experts, self.rounds[0], self.live.tokenizer, self.live.sight
        )


def candidates_of(ledger: Ledger) -> list[Candidate]:
    """All that were screened, by number."""
    return [Candidate.of(one) for one in ledger.trials(TrialState.COMPLETE)]


def said(values: tuple[float, float], screen: str) -> str:
    """What a candidate came to, in words."""
    if screen == "divergence":
        return f"KL to the base {-values[0]:.4f}, to the experts {-values[1]:.4f}"
    return f"keeps {values[0]:.1f} %, gains {values[1]:+.1f}"


def _plain(recipe: Recipe) -> dict[str, Any]:
    document = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"finetune", "eval"})
    return {"ktmerge": recipe.ktmerge, **document}
