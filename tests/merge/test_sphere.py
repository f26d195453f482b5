"""Mean directions of deltas that depend on one another: opposite ones, and such of a single element."""

from __future__ import annotations

import numpy as np
import pytest

from ktmerge.merge.gram import Geometry
from ktmerge.merge.sphere import direction_coefficients


def along_mean_direction(deltas: np.ndarray, weights: np.ndarray, iterations: int) -> np.ndarray:
    """Mean length along the mean direction, computed on the vectors themselves."""
    shares, lengths = weights / weights.sum(), np.linalg.norm(deltas, axis=1)
    units = deltas / lengths[:, None]
    mean = shares @ units
    if np.linalg.norm(mean) < 1e-9:
        return shares @ deltas
    mean = mean / np.linalg.norm(mean)
    for _ in range(iterations):
        tangent = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            across = unit - (unit @ mean) * mean
            if np.linalg.norm(across) > 1e-9:
                angle = np.arctan2(np.linalg.norm(across), unit @ mean)
                tangent += share * angle * across / np.linalg.norm(across)
        length = np.linalg.norm(tangent)
        mean = np.cos(length) * mean + (np.sin(length) / length * tangent if length else 0.0)
        mean = mean / np.linalg.norm(mean)
    return (shares @ lengths) * mean


@pytest.mark.every(2)
@pytest.mark.parametrize("iterations", [0, 10])
def test_dependent_deltas_have_the_mean_direction_of_their_vectors(iterations: int) -> None:
    random = np.random.default_rng(0)
    for case in range(300):
        deltas = random.standard_normal((random.integers(2, 5), random.integers(1, 6)))
        if case % 3 == 0:
            deltas[1] = -deltas[0] * random.uniform(0.5, 2)
        weights = random.uniform(0.1, 2, len(deltas)) if case % 4 else np.ones(len(deltas))
        geometry = Geometry((deltas @ deltas.T)[None], np.zeros(1))
        found = direction_coefficients(geometry, tuple(weights), iterations)[0] @ deltas
        expected = along_mean_direction(deltas, weights, iterations)
        assert np.abs(found - expected).max() < 1e-6 * np.linalg.norm(deltas, axis=1).max()


@pytest.mark.parametrize("iterations", [0, 10])
def test_an_expert_without_weight_leaves_no_trace(iterations: int) -> None:
    deltas = np.random.default_rng(1).standard_normal((3, 7))
    geometry = Geometry((deltas @ deltas.T)[None], np.zeros(1))
    assert direction_coefficients(geometry, (0.3, 0.0, 0.0), iterations)[0].tolist() == [1.0, 0.0, 0.0]
    assert direction_coefficients(geometry, (1.0, 0.0, 2.0), iterations)[0][1] == 0.0
