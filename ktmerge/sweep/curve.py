"""A number along one knob, from few evaluations: monotone through noisy points, and smooth in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ktmerge.sweep.pareto import Array

_STEPS = 1000


class Curve:
    """The monotone curve nearest to points (least squares, isotonic), interpolated by PCHIP, which adds no bumps.

    Whether it rises or falls is what fits better. Below the lowest and above the highest knob it stays as it is there.

    Args:
        knob: values of the knob [n], n >= 1; those of equal knobs are averaged.
        values: what was measured there [n].
    """

    def __init__(self, knob: Sequence[float], values: Sequence[float]) -> None:
        from scipy.interpolate import PchipInterpolator
        from scipy.optimize import isotonic_regression

        x, places = np.unique(np.asarray(knob, dtype=float), return_inverse=True)
        counts = np.bincount(places).astype(float)
        y = np.bincount(places, np.asarray(values, dtype=float)) / counts
        fits = [np.asarray(isotonic_regression(y, weights=counts, increasing=rising).x) for rising in (True, False)]
        fitted = min(fits, key=lambda fit: float((counts * (fit - y) ** 2).sum()))
        self.low, self.high = float(x[0]), float(x[-1])
        self._points = fitted
        self._between = PchipInterpolator(x, fitted) if len(x) > 1 else None

    def at(self, knob: float) -> float:
        """The value at a knob."""
        if self._between is None:
            return float(self._points[0])
        return float(self._between(min(max(knob, self.low), self.high)))

    def crossings(self, level: float) -> list[float]:
        """The knobs between which the curve goes through a level; none if it stays on one side of it."""
        grid = self.grid()
        above = np.array([self.at(knob) >= level for knob in grid])
        changes = np.flatnonzero(above[1:] != above[:-1])
        return [float((grid[i] + grid[i + 1]) / 2) for i in changes]

    def grid(self, steps: int = _STEPS) -> Array:
        """Knobs in equal steps over the range of the points."""
        return np.linspace(self.low, self.high, steps + 1)
