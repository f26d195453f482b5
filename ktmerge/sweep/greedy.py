"""Greedy soups: experts by their score, each added in that order and kept if the soup does not get worse.

Wortsman et al., ICML 2022, arXiv 2203.05482, recipe 1. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Members = frozenset[str]
"""The experts in a soup, by name."""
Merit = tuple[float, float]
"""What is compared, the first number before the second; more is better."""

_DIGITS = 9
"""Beyond these, differences of scores are rounding."""


def merit(retention: float, overall: float, limit: float) -> Merit:
    """What one soup has over another: first that it keeps enough, or more of it; then O.

    Args:
        retention: upstream score in percent of the base's.
        overall: O = E + F, in points.
        limit: least retention; minus infinity: none, and O alone decides.
    """
    return min(round(retention, _DIGITS), limit), round(overall, _DIGITS)


@dataclass(frozen=True)
class Step:
    """One soup on the way.

    Attributes:
        expert: that was added.
        members: with it.
        kept: whether it stays.
    """

    expert: str
    members: Members
    kept: bool


@dataclass(frozen=True)
class Walk:
    """How far a greedy soup has come.

    Attributes:
        ranked: the experts by what they are alone, best first; those that could not be scored are left out.
        steps: what was decided.
        wanted: the soups to be scored next; none: it is done.
    """

    ranked: tuple[str, ...]
    steps: tuple[Step, ...]
    wanted: tuple[Members, ...]

    @property
    def soup(self) -> Members:
        """The experts kept so far."""
        return next((step.members for step in reversed(self.steps) if step.kept), frozenset())


def walk(experts: Sequence[str], merits: Mapping[Members, Merit | None]) -> Walk:
    """Take the decisions that scores allow.

    Args:
        experts: all of them; of equally good ones the first goes first.
        merits: of the soups that were tried; None if one could not be blended or scored, and so is not kept.
    """
    alone = {name: frozenset([name]) for name in experts}
    if missing := tuple(members for members in alone.values() if members not in merits):
        return Walk((), (), missing)
    scored = {name: found for name, members in alone.items() if (found := merits[members]) is not None}
    ranked = tuple(sorted(scored, key=lambda name: scored[name], reverse=True))
    if not ranked:
        return Walk((), (), ())
    steps = [Step(ranked[0], alone[ranked[0]], True)]
    soup, best = alone[ranked[0]], scored[ranked[0]]
    for name in ranked[1:]:
        members = soup | {name}
        if members not in merits:
            return Walk(ranked, tuple(steps), (members,))
        found = merits[members]
        kept = found is not None and found >= best
        steps.append(Step(name, members, kept))
        if found is not None and kept:
            soup, best = members, found
    return Walk(ranked, tuple(steps), ())
