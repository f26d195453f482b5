"""How a candidate stands: upstream retention and downstream gain, and paired differences on common items."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import get_args

import numpy as np

from ktmerge.errors import UsageError
from ktmerge.eval.statistics import by_group, without_dust
from ktmerge.recipes.suites import Side
from ktmerge.sweep.rounds import ItemScores, Sets

SIDES: tuple[Side, ...] = get_args(Side)

_LEVEL = 0.05
"""Chance that a candidate is stopped although it is not worse, over all looks at it."""
_FEWEST = 8
"""Items of a side (texts, of those that were cut into chunks) below which nothing is clear."""


@dataclass(frozen=True)
class Difference:
    """A mean difference over the sets of one side, in points, and its standard error."""

    value: float
    error: float

    def at_most(self, z: float) -> float:
        """Its upper bound, z standard errors above."""
        return self.value + z * self.error


def objectives(own: ItemScores, base: ItemScores, sets: Sets) -> tuple[float, float]:
    """Upstream score in percent of the base's, and downstream gain in points, on the items both were scored on.

    Raises:
        UsageError: the base has no upstream item right, so that there is nothing to keep.
    """
    up, down = (paired(own, base, sets, side) for side in ("upstream", "downstream"))
    kept = mean(base, sets, "upstream", own)
    if kept <= 0:
        raise UsageError("the base scores 0 on the upstream sets: there is nothing to keep; choose other sets.")
    return without_dust(100 * (kept + up.value) / kept), without_dust(down.value)


def overall(own: ItemScores, base: ItemScores, sets: Sets) -> Difference:
    """O = E + F, in points: downstream gain and upstream gain."""
    up, down = (paired(own, base, sets, side) for side in SIDES)
    return Difference(up.value + down.value, sqrt(up.error**2 + down.error**2))


def mean(scores: ItemScores, sets: Sets, side: Side, like: ItemScores) -> float:
    """Mean over the sets of a side of the mean score, 0-100, on as many items as ``like`` has."""
    own = [100 * float(np.mean(scores[name][: len(like[name])])) for name in like if sets[name].side == side]
    return float(np.mean(own))


def paired(a: ItemScores, b: ItemScores, sets: Sets, side: Side) -> Difference:
    """a - b over the sets of one side, on the first items of each set, which both have.

    The variance is that of drawing whole groups (`ScoredSet`), as in the bootstrap of `ktmerge eval`. Of a set with k
    groups g of n_g items, n in all, whose differences sum to s_g and have the mean m, it is
    (sum (s_g - m n_g)^2 + (n / k)^2 / 4) / n^2: it counts one group more, half a point away on each of its items, as a
    few equal ones prove nothing.
    """
    means, variances = [], []
    for name in a:
        if sets[name].side != side or name not in b:
            continue
        n = min(len(a[name]), len(b[name]))
        differences = np.asarray(a[name][:n]) - np.asarray(b[name][:n])
        sums, sizes = by_group(differences[None], sets[name].groups[:n])
        rest = sums[0] - differences.mean() * sizes
        means.append(100 * float(differences.mean()))
        variances.append(100**2 * (float((rest**2).sum()) + 0.25 * float(sizes.mean()) ** 2) / n**2)
    return Difference(float(np.mean(means)), sqrt(sum(variances)) / len(means))


def stopped(
    own: ItemScores, base: ItemScores, best: ItemScores | None, sets: Sets, keep: float, looks: int
) -> str | None:
    """Why a candidate need not be scored further, if so.

    Either it clearly keeps less than ``keep`` of the base's upstream score; or it clearly gains less than the best
    candidate that keeps enough, and does not clearly keep more.

    Args:
        own: its scores so far.
        base: the base's scores.
        best: those of the best candidate that keeps enough, if there is one.
        sets: that were scored.
        keep: least share of the base's upstream score.
        looks: how often a candidate is looked at; the 5 % are shared by them.
    """
    if min(_drawn(own, sets, side) for side in SIDES) < _FEWEST:
        return None
    z = NormalDist().inv_cdf(1 - _LEVEL / (2 * looks))
    scaled = {name: [keep * score for score in scores] for name, scores in base.items()}
    if paired(own, scaled, sets, "upstream").at_most(z) < 0:
        return "keeps too little"
    if best is None or paired(own, best, sets, "downstream").at_most(z) >= 0:
        return None
    kept = paired(best, own, sets, "upstream")
    return None if kept.at_most(z) < 0 else "gains too little"


def _drawn(own: ItemScores, sets: Sets, side: Side) -> int:
    """How many groups of a side's items were scored."""
    return sum(len(set(sets[name].groups[: len(own[name])])) for name in own if sets[name].side == side)
