"""Thresholds of the compiled way: passes over all pieces of some tensors until every expert's is known."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.kernels.codes import BLOCK
from ktmerge.merge.kernels.search import Search, Threshold
from ktmerge.merge.program import Program, Trim
from ktmerge.merge.workspace import WIDTHS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.plan import TensorPlan
    from ktmerge.merge.steps import Steps
    from ktmerge.merge.workspace import Noted, Row, Workspace

_LARGE = 1 << 16
"""Elements from which a sample pays."""
_FEW = 1 << 21
"""Elements of one expert that are noted: 16 MB."""
_AIM = 1 << 20
"""Elements that are to be noted at most, of one expert; the sample is as large as that takes, up to ``_MOST``."""
_BLOCKS = 32
"""Blocks of a sample of a million elements, spread evenly; of more elements as many more as the square root of them."""
_MOST = 1 << 12
"""Blocks of a sample."""
_KEPT = 1 << 9
"""Bins of a sample that are kept for later, at most."""
_SHIFT, _BINS = 14, 1 << 13
"""A sample is counted in bins of ``2**_SHIFT`` patterns: 512 to a power of two, 16 powers down from its largest."""


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

    def prefix(self, position: int) -> str:
        """All stages up to the one at ``position``, spelled out."""
        return self.tensor.pipeline.prefix(position) if self.tensor.pipeline is not None else ""


class Notes:
    """The elements that one pass found in the interval of a search, and how many are above it.

    Args:
        search: what they are for.
        expert: number of the expert whose elements they are.
    """

    def __init__(self, search: Search, expert: int) -> None:
        self.search, self.expert, self.interval = search, expert, search.interval
        self.complete = True
        self._noted: list[Noted] = []
        self._room = 2 * _FEW

    def add(self, noted: Noted | None) -> None:
        """Take in those of a piece; None if there were too many."""
        if noted is None or noted.places.size > self._room:
            self.complete = False
            self._noted = []
        if noted is not None and self.complete:
            self._noted.append(noted)
            self._room -= noted.places.size

    def decide(self, space: Workspace) -> None:
        """Finish the search if its threshold is among them, or let it go on where it is."""
        above, inside = sum(one.above for one in self._noted), sum(one.places.size for one in self._noted)
        rank = self.search.rank_inside(above, inside)
        if rank is None:
            return
        floor, larger, equal = space.rank_noted(self._noted, rank, self.interval)
        if floor == 0 or rank - larger == equal:  # whether a zero is kept makes no difference
            self.search.settle(floor)
        else:
            self.search.settle(floor, space.rank_hashes(self._noted, floor, rank - larger))


Found = list[tuple[Threshold, Threshold | None]]
"""What a trim keeps of each expert, outliers included, and which of that are outliers, if it has any."""
Key = tuple[str, str | tuple[str, ...]]
"""Stages, and a tensor or all tensors that are taken together."""
Thresholds = dict[Key, Found]
"""What trims keep, by the stages up to the trim."""


@dataclass(frozen=True)
class Sample:
    """How a part of an expert's delta is distributed, by magnitude patterns.

    Attributes:
        edges: uint32 ``[m]``, ascending from 0 on.
        below: uint32 ``[m]``: how many are smaller than each.
        size: how many there are.
    """

    edges: NDArray[np.uint32]
    below: NDArray[np.uint32]
    size: int

    def thinned(self, most: int) -> Sample:
        """With so many edges at most, where they divide the elements most evenly."""
        if self.edges.size <= most:
            return self
        places = self.below.searchsorted(np.linspace(0, self.size, most), side="right") - 1
        places[0] = 0
        return Sample(self.edges[places], self.below[places], self.size)


@dataclass
class Recollected:
    """What was found of some inputs before, and is found now.

    Attributes:
        thresholds: not to be trusted before the blend that uses them has counted what they keep.
        samples: of each expert, by the stages before the trim.
        is_new: something was added.
    """

    thresholds: Thresholds = field(default_factory=dict)
    samples: dict[Key, list[Sample]] = field(default_factory=dict)
    is_new: bool = False

    def add(self, key: Key, found: Found) -> None:
        """Take in a threshold that was just found."""
        self.thresholds[key] = found
        self.is_new = True


Work = Callable[["Workspace", Job], Any]
"""What is done with a piece that a workspace holds."""
Run = Callable[[Iterable[Job], Work], Iterator[Any]]
"""Does some work on every piece of some tensors."""


def find_thresholds(
    jobs: Sequence[Job], position: int, run: Run, probe: Workspace, recollected: Recollected | None = None
) -> Found | None:
    """What the trim at ``position`` keeps of each expert, in all these tensors together; None if not all are finite.

    Args:
        jobs: tensors of the same program; the thresholds of earlier positions are set.
        position: of the trim among the transforms.
        run: does work on every piece.
        probe: a workspace for samples.
        recollected: samples of these tensors that were taken before; one that is taken now is added.
    """
    step = jobs[0].program.steps[position]
    assert isinstance(step, Trim)
    elements = sum(job.elements for job in jobs)
    both, outliers = step.counts(elements)
    counts = (both, outliers) if outliers else (both,)
    searches = [Search(count, elements) for _ in jobs[0].rows[1:] for count in counts]
    experts = [number // len(counts) for number in range(len(searches))]
    if elements >= _LARGE:
        _hint(searches, experts, jobs, position, probe, Recollected() if recollected is None else recollected)
    lock = threading.Lock()
    crowded: set[int] = set()
    while wanted := [number for number, search in enumerate(searches) if not search.done]:
        few = [number for number in wanted if number not in crowded and _is_notable(searches[number])]
        notes = [Notes(searches[number], experts[number]) for number in few]
        many = [(experts[number], searches[number]) for number in wanted if number not in few]

        if not all(list(run(jobs, partial(_look, position, elements, notes, many, lock)))):
            return None
        for _, search in many:
            search.end_pass()
        for number, one in zip(few, notes, strict=True):
            if one.complete:
                one.decide(probe)
            else:
                crowded.add(number)
    results = [search.result() for search in searches]
    if not outliers:
        return [(kept, None) for kept in results]
    return list(zip(results[::2], results[1::2], strict=True))


def _look(
    position: int,
    elements: int,
    notes: Sequence[Notes],
    many: Sequence[tuple[int, Search]],
    lock: threading.Lock,
    space: Workspace,
    job: Job,
) -> bool:
    """Note or count what a piece has for the searches; whether it is finite."""
    asked = [(one.expert, one.interval, one.search.expected / elements) for one in notes]
    noted = space.note(job.steps, position, asked) if notes else []
    if noted is None:
        return False
    measured = space.measure(job.steps, position, [(expert, one.interval) for expert, one in many]) if many else []
    if measured is None:
        return False
    with lock:
        for one, found in zip(notes, noted, strict=True):
            one.add(found)
        for (_, search), (counts, lows) in zip(many, measured, strict=True):
            search.add(counts, lows)
    return True


def _is_notable(search: Search) -> bool:
    return not search.interval.hashed and search.expected <= _FEW


def _hint(
    searches: Sequence[Search],
    experts: Sequence[int],
    jobs: Sequence[Job],
    position: int,
    probe: Workspace,
    recollected: Recollected,
) -> None:
    """Show the searches, each of an expert, a sample over all tensors."""
    if all(search.done for search in searches):
        return
    names = tuple(job.tensor.name for job in jobs)
    key = jobs[0].prefix(position - 1), names if len(names) > 1 else names[0]
    samples = recollected.samples.get(key)
    if samples is None or len(samples) != len(jobs[0].rows) - 1:
        patterns = _sample(jobs, position, probe)
        if patterns is None:
            return  # the pass over everything finds the same
        samples = [distribution(row, probe) for row in patterns]
        recollected.samples[key] = [one.thinned(_KEPT) for one in samples]
        recollected.is_new = True
    for search, expert in zip(searches, experts, strict=True):
        if not search.done:
            search.hint(samples[expert].edges, samples[expert].below, samples[expert].size)


def distribution(patterns: NDArray[np.uint32], probe: Workspace) -> Sample:
    """Of so many patterns."""
    top = int(patterns.max()) + 1
    low = max(0, top - (_BINS << _SHIFT))
    counts = np.zeros(_BINS + 1, np.int64)
    probe.tally(patterns, low, _SHIFT, counts)
    filled = np.flatnonzero(counts)
    below = patterns.size - counts[filled][::-1].cumsum()[::-1]
    edges = low + (filled << _SHIFT)
    return Sample(
        np.concatenate(([0], edges, [top])).astype(np.uint32),
        np.concatenate(([0], below, [patterns.size])).astype(np.uint32),
        patterns.size,
    )


def _sample(jobs: Sequence[Job], position: int, probe: Workspace) -> NDArray[np.uint32] | None:
    """Blocks at even distances: ``[N, elements]``; None if an input is not finite."""
    ends = np.cumsum([job.elements for job in jobs])
    places = np.linspace(0, ends[-1], _blocks(int(ends[-1])), endpoint=False).astype(np.int64)
    numbers = ends.searchsorted(places, side="right")
    sizes = [min(BLOCK, job.elements) for job in jobs]
    patterns = np.empty((len(jobs[0].rows) - 1, sum(sizes[number] for number in numbers)), np.uint32)
    rest = patterns
    for number in np.unique(numbers):
        job, size = jobs[number], sizes[number]
        first = ends[number] - job.elements
        blocks = np.minimum(places[numbers == number] - first, job.elements - size) // 8 * 8
        probe.hold(job.rows, 0, size)
        sampled = probe.sample(job.steps, position, blocks.tolist())
        if sampled is None:
            return None
        rest[:, : blocks.size * size].reshape(sampled.shape)[:] = sampled  # in place: no second copy
        rest = rest[:, blocks.size * size :]
    return patterns


def _blocks(elements: int) -> int:
    """How many blocks a sample has: an interval holds a share of all that falls with the root of the sample's size."""
    wanted = (4.8 * elements / _AIM) ** 2 / BLOCK
    return math.ceil(min(_MOST, max(_BLOCKS * math.sqrt(elements / (1 << 20)), wanted)))
