"""Thresholds of the compiled way: passes over all pieces of some tensors until every expert's is known."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.kernels.codes import BLOCK
from ktmerge.merge.kernels.search import Interval, Search, Threshold
from ktmerge.merge.program import Program, Trim
from ktmerge.merge.workspace import WIDTHS, Noted

if TYPE_CHECKING:
    from ktmerge.merge.plan import TensorPlan
    from ktmerge.merge.steps import Steps
    from ktmerge.merge.workspace import Measured, Row, Workspace

_LARGE = 1 << 18
"""Elements from which a sample pays."""
_BLOCKS = 16
"""Blocks of a sample, spread evenly; of more elements as many more as the square root of their number."""
_FEW = 1 << 21
"""Candidates of one expert that are kept: 16 MB."""
_COARSE = 15
"""Shift of an interval that was not narrowed by a sample: most elements would be candidates."""


@dataclass(frozen=True)
class Job:
    """One tensor as the kernels see it: ``kind`` is the code of the output's type."""

    tensor: TensorPlan
    rows: Sequence[Row]
    steps: Steps
    program: Program
    kind: int
    stochastic: bool

    @property
    def elements(self) -> int:
        return self.tensor.info.numel

    @property
    def width(self) -> int:
        """Bytes of an element of the output."""
        return WIDTHS[self.kind]


class Candidates:
    """The elements that one pass found in its interval, as long as they are few: the next pass is then about them only.

    Args:
        interval: of the pass.
    """

    def __init__(self, interval: Interval) -> None:
        self._hashed = interval.hashed
        self._noted: list[Noted] | None = []
        self.room = 0 if interval.hashed or interval.shift >= _COARSE else _FEW

    def add(self, measured: Measured, start: int, key: int) -> None:
        """Take in those of a piece that begins at element ``start``; ``key`` is of the hash of its tensor."""
        if self._noted is None or measured.places is None or measured.patterns is None:
            self._noted, self.room = None, 0
            return
        self._noted.append(Noted(measured.places.copy(), measured.patterns.copy(), start, key))
        self.room = max(0, self.room - measured.places.size)

    def decide(self, search: Search, space: Workspace) -> None:
        """Finish a search that now asks for the hashes of one magnitude, without another look at the tensors."""
        if self._noted is None or self._hashed:
            return
        while not search.done and search.interval.hashed:
            for noted in self._noted:
                search.add(space.tally(search.interval, noted))
            search.end_pass()


Found = list[tuple[Threshold, Threshold | None]]
"""What a trim keeps of each expert, outliers included, and which of that are outliers, if it has any."""
Thresholds = dict[Hashable, Found]
"""What trims keep, by stages up to the trim and by tensor, or by all tensors that share a threshold."""
Work = Callable[["Workspace", Job], Any]
"""What is done with a piece that a workspace holds."""
Run = Callable[[Iterable[Job], Work], Iterator[Any]]
"""Does some work on every piece of some tensors."""


def find_thresholds(jobs: Sequence[Job], position: int, run: Run, probe: Workspace) -> Found | None:
    """What the trim at ``position`` keeps of each expert, in all these tensors together; None if not all are finite.

    Args:
        jobs: tensors of the same program; the thresholds of earlier positions are set.
        position: of the trim among the transforms.
        run: does work on every piece.
        probe: a workspace for samples.
    """
    step = jobs[0].program.steps[position]
    assert isinstance(step, Trim)
    elements = sum(job.elements for job in jobs)
    both, outliers = step.counts(elements)
    counts = (both, outliers) if outliers else (both,)
    searches = [Search(count, elements) for _ in jobs[0].rows[1:] for count in counts]
    experts = [number // len(counts) for number in range(len(searches))]
    if elements >= _LARGE:
        _hint(searches, experts, jobs, position, probe)
    lock = threading.Lock()
    while wanted := [number for number, search in enumerate(searches) if not search.done]:
        near = {number: Candidates(searches[number].interval) for number in wanted}

        def count(
            space: Workspace, job: Job, wanted: Sequence[int] = tuple(wanted), near: Mapping[int, Candidates] = near
        ) -> bool:
            asked = [(experts[number], searches[number].interval, near[number].room) for number in wanted]
            measured = space.measure(job.steps, position, asked)
            if measured is None:
                return False
            with lock:
                for number, found in zip(wanted, measured, strict=True):
                    searches[number].add(found.counts, found.lows)
                    near[number].add(found, space.start, job.steps.key(position, experts[number]))
            return True

        if not all(list(run(jobs, count))):
            return None
        for number in wanted:
            searches[number].end_pass()
            near[number].decide(searches[number], probe)
    results = [search.result() for search in searches]
    if not outliers:
        return [(kept, None) for kept in results]
    return list(zip(results[::2], results[1::2], strict=True))


def _hint(
    searches: Sequence[Search], experts: Sequence[int], jobs: Sequence[Job], position: int, probe: Workspace
) -> None:
    """Show the searches, each of an expert, a sample: blocks at even distances over all tensors."""
    wanted = {expert for search, expert in zip(searches, experts, strict=True) if not search.done}
    if not wanted:
        return
    ends = np.cumsum([job.elements for job in jobs])
    found: dict[int, list[Any]] = {expert: [] for expert in wanted}
    blocks = int(_BLOCKS * max(1.0, math.sqrt(ends[-1] / (1 << 20))))
    for place in np.linspace(0, ends[-1], blocks, endpoint=False).astype(np.int64):
        number = int(ends.searchsorted(place, side="right"))
        job = jobs[number]
        start = int(place - (ends[number] - job.elements)) // BLOCK * BLOCK
        probe.hold(job.rows, start, min(start + BLOCK, job.elements))
        for expert in wanted:
            found[expert].append(probe.sample(expert + 1, job.steps, position))
    for search, expert in zip(searches, experts, strict=True):
        if not search.done:
            search.hint(np.concatenate(found[expert]))
