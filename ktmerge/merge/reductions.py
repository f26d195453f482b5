"""What the compiled way has to know of whole tensors before it can sum deltas: norms and inner products, exactly.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.geometry import Geometry, geometry_of, units
from ktmerge.merge.kernels.codes import SENSITIVITY
from ktmerge.merge.kernels.exact import HALF, exact_value
from ktmerge.merge.program import Energies, Measured, Ruled
from ktmerge.merge.ranking import LOW_BITS, quantile_rank
from ktmerge.merge.selection import Job, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.workspace import Workspace


def weights_of(combine: Measured, jobs: Sequence[Job], run: Run) -> Sequence[float] | None:
    """The weights of the deltas of these tensors, taken together; None if an input is not finite.

    Args:
        combine: of all of them.
        jobs: thresholds of their transforms are set.
        run: does work on every piece.
    """
    if combine.measure == "geometry":
        geometry = _geometry(jobs, run)
        return None if geometry is None else combine.weights(geometry)
    energies = energies_of(jobs, run, with_experts=combine.measure == "experts")
    return None if energies is None else combine.weights(energies)


def _geometry(jobs: Sequence[Job], run: Run) -> Geometry | None:
    """Inner products of the deltas after the transforms."""

    def largest(space: Workspace, job: Job) -> NDArray[Any] | None:
        found = [np.maximum(part.max(axis=1), -part.min(axis=1)) for part in space.parts(job.steps)]
        return np.max(found, axis=0) if space.is_finite else None

    def products(space: Workspace, job: Job) -> NDArray[Any] | None:
        sums = np.zeros((2 * vectors, 2 * vectors), np.int64)
        for part in space.parts(job.steps):
            space.add_products(np.roll(range(vectors), -1).tolist(), part, unit, sums)
        return sums if space.is_finite else None

    tops = list(run(jobs, largest))
    if any(one is None for one in tops):
        return None
    exponents = np.frexp(np.roll(np.max(tops, axis=0), -1).astype(np.float64))[1][None]
    unit, vectors = units(exponents), exponents.shape[1]
    found = list(run(jobs, products))
    return None if any(one is None for one in found) else geometry_of(np.sum(found, axis=0)[None], exponents)


def answered(combine: Ruled, jobs: Sequence[Job], run: Run) -> Ruled | None:
    """The rule with what it asks for of these tensors; None if an input is not finite."""
    assert combine.answer is not None
    if combine.asks == "limit":
        limit = _limit(combine, jobs, run)
        return None if limit is None else combine.answer(limit)
    counts = list(run(jobs, partial(_count_overlap, combine)))
    return None if any(one is None for one in counts) else combine.answer(*np.sum(counts, axis=0).tolist())


def _limit(combine: Ruled, jobs: Sequence[Job], run: Run) -> float | None:
    """The sensitivity of its rank, exactly: by the upper half of its pattern first, then by the lower."""
    rank = quantile_rank(combine.share, sum(job.elements for job in jobs))
    wanted = replace(combine, rule=SENSITIVITY)
    low, shift, bins = 0, LOW_BITS, 1 << (31 - LOW_BITS)
    for _ in range(2):
        counts = np.zeros(bins + 1, np.int64)
        for found in run(jobs, partial(_tally, wanted, low, shift, bins)):
            if found is None:
                return None
            counts += found
        number = int(counts[:-1].cumsum().searchsorted(rank, side="right"))
        rank -= int(counts[:number].sum())
        low, shift, bins = low + (number << shift), 0, 1 << LOW_BITS
    return float(np.uint32(low).view(np.float32))


def _tally(wanted: Ruled, low: int, shift: int, bins: int, space: Workspace, job: Job) -> NDArray[np.int64] | None:
    counts = np.zeros(bins + 1, np.int64)
    for part in space.parts(job.steps):
        space.tally(space.ruled(wanted, part), low, shift, counts)
    return counts if space.is_finite else None


def _count_overlap(combine: Ruled, space: Workspace, job: Job) -> NDArray[np.int64] | None:
    """How many changes of each expert others share, and how many they do not."""
    counts = np.zeros((2, len(combine.weights)), np.int64)
    for part in space.parts(job.steps):
        powers = (part[0].view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
        active = (np.abs(part[1:]) >= np.float32(combine.numbers[0]) * powers) & (part[1:] != 0)
        alone = active & (active.sum(axis=0) == 1)
        own = alone.sum(axis=1)
        counts += [active.sum(axis=1) - own, own]
    return counts if space.is_finite else None


def energies_of(jobs: Sequence[Job], run: Run, *, with_experts: bool = False) -> Energies | None:
    """Squared norms of base and deltas after the transforms, and of the experts that these would make."""
    number = len(jobs[0].rows) - 1

    def work(space: Workspace, job: Job) -> NDArray[Any] | None:
        bins = np.zeros((2 * number + 1, 2, 256), np.uint64)
        for part in space.parts(job.steps):
            for own, values in zip(bins, part, strict=False):
                space.add_squares(values, own)
            for t in range(number if with_experts else 0):
                space.add_squares(part[0] + part[t + 1], bins[number + 1 + t])
        return bins if space.is_finite else None

    norms = squared_norms(run(jobs, work), 2 * number + 1)
    return None if norms is None else Energies(norms[0], norms[1 : number + 1], norms[number + 1 :])


def squared_norms(found: Iterable[NDArray[Any] | None], count: int) -> list[Fraction] | None:
    """Of ``count`` things, from squares by exponent ``[count, 2, 256]`` of every piece; None if one has none."""
    total = np.zeros((count, 2, 256), object)  # whole numbers without end
    for bins in found:
        if bins is None:
            return None
        total += bins.astype(object)
    return [exact_value(((high << HALF) + low for high, low in zip(*one, strict=True)), 2) for one in total]
