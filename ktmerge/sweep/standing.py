"""How a candidate stands: upstream retention and downstream gain, and paired differences on common items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import get_args

import numpy as np

from ktmerge.errors import UsageError
from ktmerge.recipes.suites import Side
from ktmerge.sweep.rounds import ItemScores

SIDES: tuple[Side, ...] = get_args(Side)
Sides = Mapping[str, Side]
"""The side of every set."""

_LEVEL = 0.05
"""Chance that a candidate is stopped although it is not worse, over all looks at it."""
_FEWEST = 8
"""Items of a side below which nothing is clear."""


@dataclass(frozen=True)
class Difference:
    """A mean difference over the sets of one side, in points, and its standard error."""

    value: float
    error: float

    def at_most(self, z: float) -> float:
        """Its upper bound, z standard errors above."""
        return self.value + z * self.error


def objectives(own: ItemScores, base: ItemScores, sides: Sides) -> tuple[float, float]:
    """Upstream score in percent of the base's, and downstream gain in points, on the items both were scored on.

    Raises:
        UsageError: the base has no upstream item right, so that there is nothing to keep.
    """
    up, down = (paired(own, base, sides, side) for side in ("upstream", "downstream"))
    kept = mean(base, sides, "upstream", own)
    if kept <= 0:
        raise UsageError("the base scores 0 on the upstream sets: there is nothing to keep; choose other sets.")
    return 100 * (kept + up.value) / kept, down.value


def overall(own: ItemScores, base: ItemScores, sides: Sides) -> Difference:
    """O = E + F, in points: downstream gain and upstream gain."""
    up, down = (paired(own, base, sides, side) for side in SIDES)
    return Difference(up.value + down.value, sqrt(up.error**2 + down.error**2))


def mean(scores: ItemScores, sides: Sides, side: Side, like: ItemScores) -> float:
    """Mean over the sets of a side of the mean score, 0-100, on as many items as ``like`` has."""
    own = [100 * float(np.mean(scores[name][: len(like[name])])) for name in like if sides[name] == side]
    return float(np.mean(own))


def paired(a: ItemScores, b: ItemScores, sides: Sides, side: Side) -> Difference:
    """a - b over the sets of one side, on the first items of each set, which both have.

    The variance of a set's differences counts one more, of half a point either way: a few equal items prove nothing.
    """
    means, variances = [], []
    for name in a:
        if sides[name] != side or name not in b:
            continue
        n = min(len(a[name]), len(b[name]))
        differences = np.asarray(a[name][:n]) - np.asarray(b[name][:n])
        means.append(100 * float(differences.mean()))
        variances.append(100**2 * (float(((differences - differences.mean()) ** 2).sum()) + 0.25) / n**2)
    return Difference(float(np.mean(means)), sqrt(sum(variances)) / len(means))


def stopped(
    own: ItemScores, base: ItemScores, best: ItemScores | None, sides: Sides, keep: float, looks: int
) -> str | None:
    """Why a candidate need not be scored further, if so.

    Either it clearly keeps less than ``keep`` of the base's upstream score; or it clearly gains less than the best
    candidate that keeps enough, and does not clearly keep more.

    Args:
        own: its scores so far.
        base: the base's scores.
        best: those of the best candidate that keeps enough, if there is one.
        sides: of all sets.
        keep: least share of the base's upstream score.
        looks: how often a candidate is looked at; the 5 % are shared by them.
    """
    if min(sum(len(own[name]) for name in own if sides[name] == side) for side in SIDES) < _FEWEST:
        return None
    z = NormalDist().inv_cdf(1 - _LEVEL / (2 * looks))
    scaled = {name: [keep * score for score in scores] for name, scores in base.items()}
    if paired(own, scaled, sides, "upstream").at_most(z) < 0:
        return "keeps too little"
    if best is None or paired(own, best, sides, "downstream").at_most(z) >= 0:
        return None
    kept = paired(best, own, sides, "upstream")
    return None if kept.at_most(z) < 0 else "gains too little"
