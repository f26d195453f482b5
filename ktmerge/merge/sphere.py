"""Means of deltas by their angles, as coefficients of the deltas: everything follows from inner products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktmerge.merge.geometry import Geometry

_NEARLY_PARALLEL = 0.9995
_NOTHING = 1e-9
_DEPENDENT = 1e-12
"""Eigenvalues of the cosines below this share of the largest are rounding."""


def slerp_coefficients(geometry: Geometry, steps: Sequence[float]) -> NDArray[Any]:
    """``[G, N]``: from the first delta on, go the share ``steps[t - 1]`` of the great circle to delta t.

    sin((1 - t) W) / sin(W) and sin(t W) / sin(W) with W the angle between them (Shoemake, 1985); a straight line where
    the circle is not defined or no different: |cos W| > 0.9995, or a delta of norm 0.
    """
    products, norms = geometry.products, geometry.norms
    coefficients = np.zeros_like(norms)
    coefficients[:, 0] = 1.0
    length = norms[:, 0]
    for number, step in enumerate(steps, 1):
        inner = np.einsum("ga,ga->g", coefficients, products[:, :, number])
        lengths = length * norms[:, number]
        cosine = np.divide(inner, lengths, out=np.ones_like(inner), where=lengths > 0)
        straight = np.abs(cosine) > _NEARLY_PARALLEL
        angle = np.arccos(np.where(straight, 0.0, cosine))
        sine = np.sin(angle)
        coefficients *= np.where(straight, 1 - step, np.sin((1 - step) * angle) / sine)[:, None]
        coefficients[:, number] = np.where(straight, step, np.sin(step * angle) / sine)
        length = np.sqrt(np.maximum(np.einsum("ga,gab,gb->g", coefficients, products, coefficients), 0.0))
    return coefficients


def direction_coefficients(geometry: Geometry, weights: Sequence[float], iterations: int) -> NDArray[Any]:
    """``[G, N]``: the mean length of the deltas along their mean direction; without iterations, the Euclidean mean's.

    With them, the Karcher mean of the directions: repeat d <- exp_d(sum_t w_t log_d u_t). Where the directions cancel
    there is no mean direction, and the plain mean is taken. Experts that did not move have no direction and no share,
    and those without a weight leave no trace at all.
    """
    norms = geometry.norms
    shares = np.where(norms > 0, np.asarray(weights), 0.0)
    counted = shares > 0
    shares /= np.maximum(shares.sum(1, keepdims=True), np.finfo(float).tiny)
    units, back = _frame(geometry.cosines * (counted[:, :, None] & counted[:, None, :]))
    mean = np.einsum("gt,gtr->gr", shares, units)
    length = np.linalg.norm(mean, axis=1)
    cancelled = length < _NOTHING
    mean /= np.where(cancelled, 1.0, length)[:, None]
    for _ in range(iterations):
        mean = _step(mean, shares, units)
    scale = (shares * norms).sum(1, keepdims=True)
    spherical = np.divide(scale * np.einsum("gr,gtr->gt", mean, back), norms, out=np.zeros_like(norms), where=counted)
    return np.where(cancelled[:, None], shares, spherical)


def _frame(cosines: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Orthonormal coordinates of the unit deltas, and what each of these adds to a coordinate vector's coefficients.

    Both ``[G, N, N]``, by delta and coordinate. Coefficients themselves are no coordinates to iterate in: where deltas
    are dependent (opposite, or of one element) they are not unique and grow without bound.
    """
    values, vectors = np.linalg.eigh(cosines)
    known = values > _DEPENDENT * values[:, -1:]
    roots = np.sqrt(np.where(known, values, 0.0))[:, None, :]
    inverse = np.divide(vectors, roots, out=np.zeros_like(vectors), where=np.broadcast_to(roots > 0, vectors.shape))
    return vectors * roots, inverse


def _step(mean: NDArray[Any], shares: NDArray[Any], units: NDArray[Any]) -> NDArray[Any]:
    """One step along the mean of the tangents at ``mean [G, N]``."""
    along = np.einsum("gtr,gr->gt", units, mean)
    tangents = units - along[:, :, None] * mean[:, None, :]
    sine = np.linalg.norm(tangents, axis=2)
    angle = np.arctan2(sine, along)
    # A delta opposite to the mean points in no particular direction from it; near the mean angle and sine are equal.
    ratio = np.divide(angle, sine, out=np.zeros_like(sine), where=sine > _NOTHING)
    tangent = np.einsum("gt,gtr->gr", shares * ratio, tangents)
    length = np.linalg.norm(tangent, axis=1, keepdims=True)
    turned = np.divide(np.sin(length), length, out=np.ones_like(length), where=length > 0) * tangent
    mean = np.cos(length) * mean + turned
    size = np.linalg.norm(mean, axis=1, keepdims=True)
    return np.asarray(np.divide(mean, size, out=mean, where=size > 0))
