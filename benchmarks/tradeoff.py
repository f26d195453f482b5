"""Upstream against downstream: normalised points, E/F/O/H, and paired bootstrap intervals.

Item scores are 0 to 100. Resamples of a set are the same for every model, so that differences between methods are
paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ktmerge.sweep.pareto import Array

Items = Mapping[str, Array]
"""Item scores of one model by set."""


@dataclass(frozen=True)
class Resamples:
    """How often each item of each set counts: the first row once each, then ``draws`` bootstrap resamples."""

    weights: Mapping[str, Array]

    @classmethod
    def of(cls, sizes: Mapping[str, int], draws: int, seed: int = 0) -> Resamples:
        """Draw items with replacement inside each set."""
        generator = np.random.default_rng(seed)
        found = {}
        for name, size in sorted(sizes.items()):
            counts = generator.multinomial(size, np.full(size, 1 / size), size=draws)
            found[name] = np.vstack([np.ones(size), counts]) / size
        return cls(found)

    def mean(self, name: str, items: Array) -> Array:
        """The set's mean ``[1 + draws]``."""
        return self.weights[name] @ items


@dataclass(frozen=True)
class Sides:
    """The sets of both sides, and the models between which scores are normalised.

    Attributes:
        upstream: names of sets.
        downstream: likewise, one for each expert.
        base: item scores of the base.
        experts: of each expert, by the set it was tuned for.
    """

    upstream: Sequence[str]
    downstream: Sequence[str]
    base: Items
    experts: Mapping[str, Items]
    resamples: Resamples

    def raw(self, items: Items) -> tuple[Array, Array]:
        """U and D ``[1 + draws]``: means over the sets of each side."""
        return self._mean(items, self.upstream), self._mean(items, self.downstream)

    def normalised(self, items: Items) -> tuple[Array, Array]:
        """u and d: the mean over sets of where a score lies between its ends.

        u is 1 at the base and 0 at the mean of the experts; d is 0 at the base and 1 where each task's own expert is.
        """
        mean = self.resamples.mean
        up, down = [], []
        for name in self.upstream:
            low = np.mean([mean(name, expert[name]) for expert in self.experts.values()], axis=0)
            up.append((mean(name, items[name]) - low) / (mean(name, self.base[name]) - low))
        for name in self.downstream:
            low, high = mean(name, self.base[name]), mean(name, self.experts[name][name])
            down.append((mean(name, items[name]) - low) / (high - low))
        return np.mean(up, axis=0), np.mean(down, axis=0)

    def gains(self, items: Items) -> dict[str, Array]:
        """E, F, O and H in points."""
        up, down = self.raw(items)
        base_up, base_down = self.raw(self.base)
        return {
            "E": down - base_down,
            "F": up - base_up,
            "O": down - base_down + up - base_up,
            "H": harmonic(up, down),
        }

    def _mean(self, items: Items, names: Sequence[str]) -> Array:
        return np.mean([self.resamples.mean(name, items[name]) for name in names], axis=0)


def harmonic(first: Array, second: Array) -> Array:
    """2ab / (a + b) of what is above 0; else 0."""
    a, b = np.maximum(first, 0), np.maximum(second, 0)
    return np.divide(2 * a * b, a + b, out=np.zeros_like(a), where=a + b > 0)


def interval(values: Array, level: float = 0.95) -> tuple[float, float, float]:
    """The estimate (first value) and the percentile interval of the resamples (the others)."""
    low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(values[0]), float(low), float(high)


def hypervolume(points: Array) -> Array:
    """Area between (0, 0) and the staircase over the points ``[n, 2, ...]``; what is below 0 counts as 0."""
    first, second = np.maximum(points[:, 0], 0), np.maximum(points[:, 1], 0)
    order = np.argsort(-first, axis=0, kind="stable")
    wide, high = np.take_along_axis(first, order, 0), np.take_along_axis(second, order, 0)
    steps = wide - np.concatenate([wide[1:], np.zeros_like(wide[:1])])
    return np.asarray((steps * np.maximum.accumulate(high, axis=0)).sum(axis=0))
