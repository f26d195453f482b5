"""What became of the items that tuning changed: healed, preserved, damaged upstream; retained downstream.

Going back to the base heals everything and retains nothing; a summary of upstream scores alone would call that success.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# b, t, m: the base, the reference fine-tune, the model answer an item right (score above 0.5).
FORMULAS = {
    "preserved": "preserved = share of upstream items right in base and fine-tune that the model has right",
    "healed": "healed = share of upstream items right in the base, wrong in the fine-tune, that the model has right",
    "damaged": "damaged = share of upstream items right in the base that the model has wrong",
    "retained": "retained = share of downstream items wrong in the base, right in the fine-tune, the model has right",
}


@dataclass(frozen=True)
class Share:
    """``count`` of ``total`` items; ``percent`` is None where there are none to speak of."""

    count: int
    total: int

    @property
    def percent(self) -> float | None:
        return 100 * self.count / self.total if self.total else None


@dataclass(frozen=True)
class Partition:
    """One model's shares, see :data:`FORMULAS`; items of all sets of a side together."""

    preserved: Share
    healed: Share
    damaged: Share
    retained: Share


Triple = tuple["NDArray[np.float64]", "NDArray[np.float64]", "NDArray[np.float64]"]


def partition(upstream: Sequence[Triple], downstream: Sequence[Triple]) -> Partition:
    """Count items from the scores [items] of base, fine-tune and model, a triple for each set."""
    b, t, m = _right(upstream)
    bd, td, md = _right(downstream)
    return Partition(
        preserved=_share(b & t, m), healed=_share(b & ~t, m), damaged=_share(b, ~m), retained=_share(~bd & td, md)
    )


def _right(sets: Sequence[Triple]) -> list[NDArray[np.bool_]]:
    empty = np.zeros(0)
    return [np.concatenate([empty, *(triple[i] for triple in sets)]) > 0.5 for i in range(3)]


def _share(among: NDArray[np.bool_], hit: NDArray[np.bool_]) -> Share:
    return Share(int((among & hit).sum()), int(among.sum()))
