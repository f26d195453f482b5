"""Means, standard errors and the paired bootstrap. Knows arrays of item scores, nothing of what was scored.

``groups`` say of each item what it is drawn with: chunks of one text, or questions on one image, are not independent of
each other, so that whole texts are drawn (a cluster bootstrap). By default every item is a group by itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Groups = Sequence[int] | None

LEVEL = 0.95
_BLOCK = 2**23  # resampled scores held at once: 64 MiB


def groups_of(rows: Sequence[int]) -> list[int]:
    """Of each item what it is drawn with, from its row: the chunks of a text go together; those of a single text, which
    would leave nothing to draw, each by itself."""
    return list(rows) if len(set(rows)) > 1 else list(range(len(rows)))


def drawn_in_words(groups: Iterable[Sequence[int]]) -> str:
    """What is drawn where items have these groups."""
    together = any(len(set(own)) < len(own) for own in groups)
    return "items, those of one text or image together" if together else "items"


def mean(scores: NDArray[np.float64]) -> float:
    """Mean item score on 0-100."""
    return float(100 * scores.mean())


def standard_error(scores: NDArray[np.float64], groups: Groups = None) -> float | None:
    """Of the mean item score, on 0-100; None for a single group.

    With k groups g of n_g items that sum to s_g, and the mean m over all n items: sqrt(k / (k - 1) sum (s_g - m n_g)^2)
    / n. Of items that are groups by themselves that is sd / sqrt(n), sd with n - 1.
    """
    sums, sizes = by_group(scores[None], groups)
    if len(sizes) < 2:
        return None
    rest = sums[0] - scores.mean() * sizes
    return float(100 * np.sqrt((rest**2).sum() * len(sizes) / (len(sizes) - 1)) / len(scores))


def resampled_means(
    tasks: Mapping[str, NDArray[np.float64]], resamples: int, seed: int, groups: Mapping[str, Groups] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Bootstrap each task's mean (0-100) for all models at once.

    Groups of items are drawn with replacement inside each task, the same draw for every model: what models share on an
    item cancels in their differences. A task's draw depends on seed and task name only, not on which other tasks there
    are.

    Args:
        tasks: per task name the item scores [models, items] in [0, 1].
        resamples: R.
        seed: of the draws.
        groups: per task name, of each item its group.

    Returns:
        per task name [models, R].
    """
    return {
        name: _resample(*by_group(scores, (groups or {}).get(name)), resamples, _generator(seed, name))
        for name, scores in tasks.items()
    }


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


def by_group(scores: NDArray[np.float64], groups: Groups) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of the scores [models, items] of each group [models, groups], and how many items a group has [groups]."""
    if groups is None:
        return scores, np.ones(scores.shape[1])
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.stack([np.bincount(place, weights=own) for own in scores]).astype(float)
    return sums, np.bincount(place).astype(float)


def _resample(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    models, groups = sums.shape
    means = np.empty((models, resamples))
    block = max(1, _BLOCK // (groups * models))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = generator.integers(0, groups, size=(stop - start, groups))
        means[:, start:stop] = sums[:, drawn].sum(axis=2) / sizes[drawn].sum(axis=1)
    return 100 * means
