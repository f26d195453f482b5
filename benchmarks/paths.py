"""The ways on which a method is swept from the base to the experts, found from what it says of itself.

Two ways are known: by lambda, at the same distances from the base for every method; and by the method's own knob, if
it has one: a number at whose ends it says to keep everything, or nothing; or failing that the density, or the weight of
the base as a participant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ktmerge.merge.settings import blend_setting
from ktmerge.merge.stage import Method
from ktmerge.recipes.schema import Blend

COARSE, FINE = 4, 4
"""Points on a way that are set beforehand, and those that are put where its front has the widest gaps."""

DISTANCES = (0.2, 0.45, 0.7, 1.0)
"""||theta - theta_0|| as shares of the experts' mean ||tau||, for ways by lambda."""

_DENSITIES = (0.05, 0.15, 0.4, 1.0)
_SHARES = (0.2, 0.45, 0.7, 1.0)
_FACTORS = (1 / 16, 1 / 2, 4.0, 32.0)


@dataclass(frozen=True)
class Way:
    """What is turned, and how far.

    Attributes:
        name: of a parameter, or lambda.
        values: `COARSE` ones, in order.
        start: the value that gives the base; None if there is none.
        even: whether steps are equal; else factors are.
    """

    name: str
    values: tuple[float, ...]
    start: float | None
    even: bool = True

    def between(self, first: float, second: float) -> float:
        """The middle of two values."""
        return (first + second) / 2 if self.even else math.sqrt(first * second)


def line(unit: float) -> Way:
    """The way by lambda; ``unit`` is the lambda at which a method is as far from the base as its experts are."""
    return Way("lambda", tuple(share * unit for share in DISTANCES), 0.0)


@dataclass(frozen=True)
class _Number:
    name: str
    default: float
    least: float | None
    most: float | None


def takes(method: Method, experts: int) -> bool:
    """Whether a method makes sense with so many experts."""
    least, most = method.experts
    return least <= experts and (most is None or experts <= most)


def knob_of(method: Method) -> Way | None:
    """The way by a method's own knob; None if lambda is all there is."""
    numbers = {number.name: number for number in _numbers(method)}
    neutral, nothing = method.promises.neutral or {}, method.promises.nothing or {}
    order = [[*neutral.keys() & nothing.keys()], neutral, nothing, ["density", "base_weight"]]
    chosen = next((name for names in order for name in numbers if name in names), None)
    if chosen is None:
        return None
    return _way(numbers[chosen], nothing.get(chosen), neutral.get(chosen))


def _way(number: _Number, nothing: Any, neutral: Any) -> Way:
    if number.name == "density":
        return Way(number.name, _DENSITIES, None, even=False)
    low, high = (nothing, neutral) if _finite(nothing) and _finite(neutral) else (number.least, number.most)
    if _finite(low) and _finite(high):
        values = tuple(low + (high - low) * share for share in _SHARES)
        return Way(number.name, values, low if _finite(nothing) else None)
    return Way(number.name, tuple((number.default or 1.0) * factor for factor in _FACTORS), None, even=False)


def _finite(value: Any) -> bool:
    """Whether a number is an end to go to, not the last one that a parameter takes."""
    return isinstance(value, (int, float)) and abs(value) < 1e6


def _numbers(method: Method) -> Iterator[_Number]:
    """The numeric parameters of what a method does to matrices, in the order of its stages."""
    for use in blend_setting(Blend(method=method.name)).pipelines["matrix"].uses:
        for name, field in type(use.parameters).model_fields.items():
            if field.annotation is float:
                bounds: Mapping[str, float] = {
                    key: getattr(mark, key) for mark in field.metadata for key in ("ge", "gt", "le", "lt")
                    if hasattr(mark, key)
                }  # fmt: skip
                yield _Number(
                    name,
                    float(getattr(use.parameters, name)),
                    bounds.get("ge", bounds.get("gt")),
                    bounds.get("le", bounds.get("lt")),
                )
