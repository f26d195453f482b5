"""The transforms of one tensor as the arrays that the compiled kernels read. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ktmerge.merge.kernels.codes import DROP, NOTHING, TRIM
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.kernels.search import Threshold
from ktmerge.merge.program import Drop, Trim

_NEVER = 1 << 31
"""Above every magnitude pattern."""


class Steps:
    """Numbers of every transform and expert; thresholds are filled in when they are known.

    Args:
        steps: the transforms, in order.
        experts: names, in the plan's order.
        seed: the recipe's.
        tensor: the key under which random choices are made.
    """

    def __init__(self, steps: Sequence[Trim | Drop], experts: Sequence[str], seed: int, tensor: str) -> None:
        self._count = len(steps)
        shape = (max(1, len(steps)), len(experts))
        self._codes = np.full(shape[0], NOTHING, np.int64)
        self._floors = np.zeros(shape, np.uint32)
        self._leasts = np.zeros(shape, np.uint64)
        self._spans = np.zeros(shape, np.uint32)
        self._tops = np.zeros(shape, np.uint64)
        self._cuts = np.zeros(shape, np.uint64)
        self._factors = np.zeros(shape, np.float32)
        self._keys = np.zeros(shape, np.uint64)
        for position, step in enumerate(steps):
            self._codes[position] = TRIM if isinstance(step, Trim) else DROP
            self._keys[position] = [stream_key(seed, step.purpose, expert, tensor) for expert in experts]
            if isinstance(step, Drop):
                self._cuts[position] = round(step.density * 2**32)
                self._factors[position] = step.factor

    def key(self, position: int, expert: int) -> int:
        """Of the random stream or hash."""
        return int(self._keys[position, expert])

    def set_thresholds(self, position: int, found: Sequence[tuple[Threshold, Threshold | None]]) -> None:
        """What the trim at ``position`` keeps of each expert, and which of those are outliers."""
        for expert, (kept, outliers) in enumerate(found):
            floor, least = edge(kept)
            end, top = edge(outliers) if outliers is not None else (_NEVER, 0)
            self._floors[position, expert], self._leasts[position, expert] = floor, least
            self._spans[position, expert] = max(0, end + (top > 0) - floor)
            self._tops[position, expert] = top

    @property
    def has_outliers(self) -> bool:
        """Whether a trim drops some of the largest, too."""
        return bool(self._tops.any())

    def arguments(self, count: int) -> tuple[int, ...]:
        """The kernels' arguments for the first ``count`` transforms, 1 also where there is none: NOTHING is done then.

        Valid as long as this object is.
        """
        arrays = (
            self._codes, self._floors, self._leasts, self._spans, self._tops, self._keys, self._cuts, self._factors,
        )  # fmt: skip
        return (count, *(array.ctypes.data for array in arrays))

    def __len__(self) -> int:
        return self._count


def edge(threshold: Threshold) -> tuple[int, int]:
    """Least magnitude pattern, and least hash of those that have just that."""
    if threshold.keeps_all or threshold.keeps_none:
        return (0 if threshold.keeps_all else _NEVER), 0
    return threshold.floor, threshold.least
