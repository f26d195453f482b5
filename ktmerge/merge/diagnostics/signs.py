"""The few signs by which a recipe is chosen, read off an inspection, and what each of them says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.merge.diagnostics.measures import ALL, Movement, Pair
from ktmerge.merge.diagnostics.table import percent
from ktmerge.merge.diagnostics.warnings import ALIKE, FAR

if TYPE_CHECKING:
    from ktmerge.merge.diagnostics.inspection import Inspection

LOW_RANK = 0.15
"""Share of a matrix's directions that hold 90 % of a change below which it is called low-rank, as adapters make it."""
SPARSE = 0.5
"""Share of the weights that changed below which a fine-tune is called sparse."""
RELATED = 0.1
"""Cosine between two experts' changes above which they have something in common."""
CONFLICT = 0.4
"""Share of opposite signs from which on two experts contradict one another as often as strangers do."""
SMALL_STEPS = 2.0
"""Ulps of the base's type; changes that are mostly below do not survive scaling and rounding to the nearest."""


@dataclass(frozen=True)
class Signs:
    """What the choice goes by.

    Attributes:
        experts: how many.
        statistics: whether data of both sides are at hand to measure on.
        relative: ||tau|| / ||theta_0|| of the matrices, of the expert that moved furthest.
        changed: share of the weights that the expert that changed least changed.
        small: share of the changes below `SMALL_STEPS` ulps, of the expert with the most.
        rank: share of the directions that hold 90 % of a change's energy, mean over sampled matrices; None: unknown.
        cosine: between experts' changes, mean over pairs; None with one.
        conflict: share of opposite signs where two changed, likewise.
        effective: mean over tensors of how many experts changed it.
    """

    experts: int
    statistics: bool
    relative: float
    changed: float
    small: float
    rank: float | None
    cosine: float | None
    conflict: float | None
    effective: float

    @classmethod
    def of(cls, found: Inspection, statistics: bool, rank: float | None = None) -> Signs:
        """Read them off an inspection."""
        moved = [found.movement(name, ALL) or Movement() for name in found.models]
        spreads = [found.spread(name, ALL) for name in found.models]
        pairs = [found.pair(*names, ALL) or Pair() for names in found.pairs]
        effective = found.effective(ALL)
        return cls(
            experts=len(moved),
            statistics=statistics,
            relative=max(found.matrices[name].relative for name in found.models),
            changed=min(one.share for one in moved),
            small=max(one.below(SMALL_STEPS) if one is not None else 0.0 for one in spreads),
            rank=rank,
            cosine=_mean([pair.cosine for pair in pairs]),
            conflict=_mean([pair.conflict for pair in pairs]),
            effective=effective.mean if effective is not None else 0.0,
        )

    def readings(self) -> Iterator[tuple[str, str, str]]:
        """What was looked at, its value, and what that means."""
        far = "further than fine-tunes usually go; keep lambda small" if self.far else "as fine-tunes do"
        yield "moved by", percent(self.relative, 2), f"of the base's norm: {far}"
        sparse = "a sparse change, which is kept whole best" if self.sparse else "a dense change"
        yield "changed", percent(self.changed, 1), f"of the weights: {sparse}"
        if self.fine:
            below = f"of the changes are below {SMALL_STEPS:g} ulps of the base's type: round stochastically"
            yield "small steps", percent(self.small, 0), below
        if self.rank is not None:
            low = "low rank, as of an adapter" if self.low_rank else "full rank: part of it may be noise"
            yield "rank", percent(self.rank, 0), f"of the directions hold 90 % of a change: {low}"
        if self.cosine is not None:
            yield "cosine", f"{self.cosine:.3f}", f"between the changes: {self._kinship}"
        if self.conflict is not None:
            often = "as often as by chance" if self.contrary else "less often than by chance"
            yield "opposite signs", percent(self.conflict, 1), f"where two changed: they contradict one another {often}"
        if self.experts > 1:
            yield "N_eff", f"{self.effective:.2f}", f"of {self.experts} experts changed a tensor, on average"

    @property
    def alike(self) -> bool:
        """Whether the experts learned the same task."""
        return self.cosine is not None and self.cosine > ALIKE

    @property
    def related(self) -> bool:
        """Whether the experts have something in common."""
        return self.cosine is not None and self.cosine > RELATED

    @property
    def far(self) -> bool:
        """Whether an expert moved further than fine-tunes do."""
        return self.relative > FAR

    @property
    def fine(self) -> bool:
        """Whether most changes are too small to survive scaling and rounding to the nearest."""
        return self.small > 0.5

    @property
    def sparse(self) -> bool:
        """Whether an expert left many weights as they were."""
        return self.changed < SPARSE

    @property
    def contrary(self) -> bool:
        """Whether experts contradict one another as often as strangers do."""
        return self.conflict is not None and self.conflict >= CONFLICT

    @property
    def low_rank(self) -> bool:
        """Whether the changes look like those of adapters."""
        return self.rank is not None and self.rank < LOW_RANK

    @property
    def _kinship(self) -> str:
        if self.alike:
            return "they learned the same"
        return "they have something in common" if self.related else "they learned unrelated things"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
