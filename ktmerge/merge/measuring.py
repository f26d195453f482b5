"""What the compiled way has to know of whole tensors before it can sum deltas: norms and inner products, exactly.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.merge.geometry import Geometry, geometry_of, units
from ktmerge.merge.kernels.exact import HALF, exact_value
from ktmerge.merge.program import Energies, Measured
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

    total = np.zeros((2 * number + 1, 2, 256), object)  # whole numbers without end
    for bins in run(jobs, work):
        if bins is None:
            return None
        total += bins.astype(object)
    norms = [_square(*one) for one in total]
    return Energies(norms[0], norms[1 : number + 1], norms[number + 1 :])


def _square(high: NDArray[Any], low: NDArray[Any]) -> Fraction:
    return exact_value(((one << HALF) + other for one, other in zip(high, low, strict=True)), 2)
