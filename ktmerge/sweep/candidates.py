"""The candidates of a sweep as they stand in its ledger: what was tried, how far it was scored, who goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.sweep.pareto import layers
from ktmerge.sweep.rounds import ItemScores, joined
from ktmerge.sweep.space import Point

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

POINT, RECIPE, STOPPED, ROUND = "point", "recipe", "stopped", "round"
"""Attributes of a trial: those of its values that its method knows; its recipe; why it was scored no further; the item
scores of one round."""


@dataclass(frozen=True)
class Candidate:
    """One candidate that was screened.

    Attributes:
        number: of its trial.
        point: what was turned.
        recipe: the whole recipe, as plain data.
        first: upstream retention in percent; screened by divergence: minus KL(base || candidate).
        second: downstream gain in points; screened by divergence: minus KL(expert || candidate).
        stopped: why it was scored no further, if so.
        rounds: item scores of each round that was scored.
    """

    number: int
    point: Point
    recipe: dict[str, Any]
    first: float
    second: float
    stopped: str | None
    rounds: list[ItemScores]

    @classmethod
    def of(cls, trial: FrozenTrial) -> Candidate:
        """From a finished trial."""
        attributes = trial.user_attrs
        rounds: list[ItemScores] = []
        while f"{ROUND} {len(rounds)}" in attributes:
            rounds.append(attributes[f"{ROUND} {len(rounds)}"])
        first, second = trial.values
        return cls(trial.number, attributes[POINT], attributes[RECIPE], first, second, attributes.get(STOPPED), rounds)

    @property
    def scores(self) -> ItemScores:
        """Of all rounds."""
        return joined(self.rounds)


@dataclass(frozen=True)
class Final:
    """A candidate that was scored on all selection items.

    Attributes:
        scores: of all selection items.
        retention: upstream score in percent of the base's.
        gain: downstream score minus the base's, in points.
        digest: of all tensors that were loaded, as `Checkpoint.content_digest` of the blended folder without the rest;
            None if it could not be told.
        left_out: tensors that were not loaded.
    """

    candidate: Candidate
    scores: ItemScores
    retention: float
    gain: float
    digest: str | None
    left_out: Sequence[str] = ()


def choose(finals: Sequence[Final], limit: float) -> tuple[Candidate | None, Candidate]:
    """The finalist that gains most of those that keep enough, if any does; and the one that keeps most."""
    keeping = [one for one in finals if one.retention >= limit]
    best = max(keeping, key=lambda one: (one.gain, one.retention, -one.candidate.number), default=None)
    nearest = max(finals, key=lambda one: (one.retention, one.gain, -one.candidate.number))
    return None if best is None else best.candidate, nearest.candidate


def best_keeping(candidates: Sequence[Candidate], limit: float) -> Candidate | None:
    """The candidate with the largest gain of those that keep enough and were not stopped; of equals the first."""
    kept = [one for one in candidates if one.stopped is None and one.first >= limit]
    return max(kept, key=lambda one: (one.second, one.first, -one.number), default=None)


def finalists(candidates: Sequence[Candidate], most: int, limit: float | None) -> list[Candidate]:
    """Who is scored on everything: the front, and behind it the next fronts while there is room.

    Of a front that is too large those nearest to the limit on either side of it, as a few items may have put them on
    the wrong one; without a limit those evenly spread along it.

    Args:
        candidates: all; those with the recipe of an earlier one are left out, and the stopped ones unless all are.
        most: how many.
        limit: least retention, if retention was measured.
    """
    different = {repr(one.recipe): one for one in sorted(candidates, key=lambda one: one.number, reverse=True)}
    going = [one for one in different.values() if one.stopped is None] or list(different.values())
    left = sorted(going, key=lambda one: one.number)
    found: list[Candidate] = []
    for layer in layers(np.array([[one.first, one.second] for one in left])):
        if not (room := most - len(found)):
            break
        own = [left[i] for i in layer]
        found += own if len(own) <= room else _nearest(own, room, limit)
    return found


def _nearest(own: Sequence[Candidate], room: int, limit: float | None) -> list[Candidate]:
    ordered = sorted(own, key=lambda one: (-one.first, one.number))
    if limit is None:
        return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, room)] if room > 1 else ordered[:room]
    above = [one for one in ordered if one.first >= limit]
    below = ordered[len(above) :]
    few = min(len(below), room // 2)
    many = min(len(above), room - few)
    return above[len(above) - many :] + below[: room - many]
