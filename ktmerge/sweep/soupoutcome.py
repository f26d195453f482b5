"""What a greedy sweep found: as any sweep, with the steps that led to the soup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ktmerge.sweep.candidates import Candidate, Final
from ktmerge.sweep.greedy import Members, Merit, Walk, merit, walk
from ktmerge.sweep.outcome import Outcome, told_estimate
from ktmerge.sweep.rounds import ItemScores, Sets
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.space import Point, members_of, told
from ktmerge.sweep.standing import Difference, overall


def walk_of(
    settings: SweepSettings, candidates: Iterable[Candidate], failed: Iterable[Point], base: ItemScores, sets: Sets
) -> Walk:
    """How far the soup has come with the candidates that were scored, and those that could not be."""
    merits: dict[Members, Merit | None] = {members_of(point): None for point in failed}
    for one in candidates:
        own = overall(one.scores, base, sets).value
        merits[members_of(one.point)] = merit(one.first, own, settings.limit)
    return walk(list(settings.recipe.experts), merits)


def choose_soup(finals: Sequence[Final], soup: Members, limit: float) -> tuple[Candidate | None, Candidate]:
    """The soup that the steps led to, if it keeps enough; and that soup, of which none keeps more if it does not."""
    last = next(one for one in finals if members_of(one.candidate.point) == soup)
    return (last.candidate if last.retention >= limit else None), last.candidate


@dataclass(frozen=True)
class SoupOutcome(Outcome):
    """The end of a greedy sweep; the finalists are all soups, of one expert or more.

    Attributes:
        walk: all steps.
    """

    walk: Walk

    @classmethod
    def of(cls, outcome: Outcome, walk: Walk) -> SoupOutcome:
        """With its steps."""
        return cls(**vars(outcome), walk=walk)

    def rule(self) -> str:
        """How the recipe was chosen."""
        limit = self.settings.limit
        last = "" if self.settings.keep is None else f"; what keeps less than {limit:g} % of base upstream comes last"
        return f"greedy soup by O = E + F{last}"

    def uncertain(self) -> tuple[str, list[Difference]]:
        """What was maximised, and each finalist's in it with its standard error."""
        return "in O", [overall(one.scores, self.base, self.sets) for one in self.finals]

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """All soups in the order of the steps: columns, rows and a title."""
        decided = {step.members: "kept" if step.kept else "left out" for step in self.walk.steps[1:]}
        ranks = {name: place for place, name in enumerate(self.walk.ranked, 1)}
        rows = []
        for one in sorted(self.finals, key=lambda one: one.candidate.number):
            number, members = one.candidate.number, members_of(one.candidate.point)
            own = self.standings[number]
            said = decided.get(members) or f"alone, {ranks[next(iter(members))]} of {len(ranks)}"
            mark = ", chosen" if self.chosen is not None and number == self.chosen.number else ""
            numbers = [told_estimate(own.retention), told_estimate(own.E, "+"), told_estimate(own.O, "+")]
            rows.append([str(number), told(one.candidate.point), *numbers, said + mark])
        title = f"Soups on the selection items ({self.rule()})"
        return ["trial", "experts", "upstream kept, %", "E, points", "O, points", "step"], rows, title

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        order = self.walk.ranked
        steps = [
            {"expert": step.expert, "soup": sorted(step.members, key=order.index), "kept": step.kept}
            for step in self.walk.steps
        ]
        return {**super().to_json(), "ranked": list(order), "steps": steps}
