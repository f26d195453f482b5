"""Means, standard errors and the paired bootstrap. Knows arrays of item scores, nothing of what was scored."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
_BLOCK = 2**23  # resampled scores held at once: 64 MiB


def mean(scores: NDArray[np.float64]) -> float:
    """Mean item score on 0-100."""
    return float(100 * scores.mean())


def standard_error(scores: NDArray[np.float64]) -> float | None:
    """sd / sqrt(n) on 0-100, sd with n - 1; None for a single item."""
    if len(scores) < 2:
        return None
    return float(100 * scores.std(ddof=1) / np.sqrt(len(scores)))


def resampled_means(
    tasks: Mapping[str, NDArray[np.float64]], resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Bootstrap each task's mean (0-100) for all models at once.

    Items are drawn with replacement inside each task, the same draw for every model: what models share on an item
    cancels in their differences. A task's draw depends on seed and task name only, not on which other tasks there are.

    Args:
        tasks: per task name the item scores [models, items] in [0, 1].
        resamples: R.
        seed: of the draws.

    Returns:
        per task name [models, R].
    """
    return {name: _resample(scores, resamples, _generator(seed, name)) for name, scores in tasks.items()}


def normal_means(
    totals: Mapping[str, Sequence[tuple[float, float]]], draws: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Of tasks known by every model's score and standard error alone: score first, then ``draws`` from that normal.

    Returns:
        per task name [models, 1 + draws], on 0-100, each model drawn by itself.
    """
    found = {}
    for name, own in totals.items():
        score, error = np.array(own, dtype=float).T[:, :, None]
        drawn = score + error * _generator(seed, name).standard_normal((len(own), draws))
        found[name] = np.concatenate([score, np.clip(drawn, 0, 100)], axis=1)
    return found


def interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap samples."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return without_dust(low), without_dust(high)


def without_dust(number: float) -> float:
    """A number without what adding and subtracting leaves in its last digits: an interval that ends at 0 holds 0."""
    return round(float(number), 9) + 0.0


def harmonic_mean(d: NDArray[np.float64] | float, u: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """2du / (d + u), 0 where both are 0."""
    total = np.asarray(d, dtype=float) + u
    safe = np.where(total == 0, 1.0, total)
    return np.asarray(np.where(total == 0, 0.0, 2 * np.asarray(d) * u / safe))


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))


def _resample(scores: NDArray[np.float64], resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    models, items = scores.shape
    means = np.empty((models, resamples))
    block = max(1, _BLOCK // (items * models))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = generator.integers(0, items, size=(stop - start, items))
        means[:, start:stop] = scores[:, drawn].mean(axis=2)
    return 100 * means
