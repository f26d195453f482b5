"""What is measured about one tuned model, or two, in some tensors: sums that add up over tensors, layers and parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

from ktmerge.merge.kernels.bins import BINS, lower_edge

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALL = "all"
"""Stands for all parts of a model together."""
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}

Own = TypeVar("Own", bound="Sums")


class Sums:
    """Numbers that add up, field by field."""

    def __add__(self: Own, other: Own) -> Own:
        return type(self)(*map(add, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class Movement(Sums):
    """How far one tuned model moved from its base: tau = theta - theta_0.

    Attributes:
        base: sum of squares of theta_0.
        delta: sum of squares of tau.
        along: inner product of tau with theta_0.
        elements: how many there are.
        changed: how many have tau != 0.
    """

    base: float = 0.0
    delta: float = 0.0
    along: float = 0.0
    elements: int = 0
    changed: int = 0

    @property
    def relative(self) -> float:
        """||tau|| / ||theta_0||; 0 if both are 0."""
        return math.sqrt(self.delta / self.base) if self.base else (math.inf if self.delta else 0.0)

    @property
    def share(self) -> float:
        """Share of the elements that changed."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def likeness(self) -> float | None:
        """Cosine between theta and theta_0; None if one is zero."""
        tuned = self.base + 2 * self.along + self.delta
        return (self.base + self.along) / math.sqrt(self.base * tuned) if self.base > 0 and tuned > 0 else None


@dataclass(frozen=True)
class Spread:
    """How |tau| / ulp(theta_0) is distributed over all elements, changed or not.

    The ulp is the distance from |theta_0| to the next larger number of the base's type; that of 0 is the least number.

    Attributes:
        histogram: int64 ``[BINS]``; see `ktmerge.merge.kernels.bins`.
        largest: exact.
    """

    histogram: NDArray[np.int64]
    largest: float = 0.0

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.histogram + other.histogram, max(self.largest, other.largest))

    def quantile(self, share: float) -> float:
        """The least value that at least this share of the elements does not exceed.

        Exact for whole numbers below 256, and for halves below 128; else up to 0.8 % too small. What is below 2**-16
        counts as 0, what is beyond 2**32 as 2**32.
        """
        rank = max(1, math.ceil(share * int(self.histogram.sum())))
        place = int(self.histogram.cumsum().searchsorted(rank))
        return lower_edge(place)

    def below(self, bound: float) -> float:
        """Share of the changed elements that moved by less than ``bound``, the lower edge of a bin, ulps."""
        changed = int(self.histogram[1:].sum())
        place = next(place for place in range(2, BINS) if lower_edge(place) >= bound)
        return int(self.histogram[1:place].sum()) / changed if changed else 0.0


@dataclass(frozen=True)
class Pair(Sums):
    """Two tuned models: inner product and squared norms of their deltas; signs where both changed."""

    dot: float = 0.0
    first: float = 0.0
    second: float = 0.0
    both: int = 0
    opposed: int = 0

    @property
    def cosine(self) -> float | None:
        """Of the two deltas; None if one is zero."""
        return self.dot / math.sqrt(self.first * self.second) if self.first and self.second else None

    @property
    def conflict(self) -> float | None:
        """Share of the elements changed by both that they moved in opposite directions; None if there are none."""
        return self.opposed / self.both if self.both else None


@dataclass(frozen=True)
class Effective:
    """N_eff, the number of tuned models that changed a tensor at all: least, most and mean over some tensors."""

    least: int
    most: int
    total: int
    tensors: int

    @classmethod
    def of(cls, counts: Iterable[int]) -> Effective:
        """From the number of each tensor; there is at least one."""
        found = list(counts)
        return cls(min(found), max(found), sum(found), len(found))

    @property
    def mean(self) -> float:
        return self.total / self.tensors

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}–{self.most}"

    def to_json(self) -> dict[str, Any]:
        return {"min": self.least, "max": self.most, "mean": round(self.mean, 3)}
