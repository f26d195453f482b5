"""The ways on which a method is swept from the base to the experts, found from what it says of itself.

Two ways are known: by lambda, at the same distances from the base for every method; and by the method's own knob, if
it has one: a number at whose ends it says to keep everything, or nothing; or failing that the density, or the weight of
the base as a participant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ktmerge.merge.settings import blend_setting
from ktmerge.merge.stage import Method
from ktmerge.recipes.schema import Blend

POINTS = 6
"""Points on every way: the budget that all methods share."""

DISTANCES = {"single": (0.15, 0.3, 0.45, 0.6, 0.8, 1.0), "multi": (0.3, 0.5, 0.7, 0.9, 1.2, 1.5)}
"""||theta - theta_0|| as shares of the experts' mean ||tau||."""

_DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
_SHARES = (0.1, 0.25, 0.4, 0.6, 0.8, 1.0)
_FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)


@dataclass(frozen=True)
class Knob:
    """A parameter and the values it is tried at."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class _Number:
    name: str
    default: float
    least: float | None
    most: float | None
    whole: bool


def takes(method: Method, experts: int) -> bool:
    """Whether a method makes sense with so many experts."""
    least, most = method.experts
    return least <= experts and (most is None or experts <= most)


def knob_of(method: Method) -> Knob | None:
    """A method's own knob; None if lambda is all there is."""
    numbers = {number.name: number for number in _numbers(method)}
    neutral, nothing = method.promises.neutral or {}, method.promises.nothing or {}
    order = [[*neutral.keys() & nothing.keys()], neutral, nothing, ["density", "base_weight"]]
    chosen = next((name for names in order for name in numbers if name in names), None)
    if chosen is None:
        return None
    return Knob(chosen, _values(numbers[chosen], nothing.get(chosen), neutral.get(chosen)))


def _values(number: _Number, nothing: Any, neutral: Any) -> tuple[float, ...]:
    if number.whole:
        start = int(number.least or 0)
        return tuple(range(start, start + POINTS))
    if number.name == "density":
        return _DENSITIES
    low, high = (nothing, neutral) if _finite(nothing) and _finite(neutral) else (number.least, number.most)
    if low is not None and high is not None:
        return tuple(low + (high - low) * share for share in _SHARES)
    return tuple((number.default or 1.0) * factor for factor in _FACTORS)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e6


def _numbers(method: Method) -> Iterator[_Number]:
    """The numeric parameters of what a method does to matrices, in the order of its stages."""
    for use in blend_setting(Blend(method=method.name)).pipelines["matrix"].uses:
        for name, field in type(use.parameters).model_fields.items():
            if field.annotation in (float, int):
                bounds: Mapping[str, float] = {
                    key: getattr(mark, key) for mark in field.metadata for key in ("ge", "gt", "le", "lt")
                    if hasattr(mark, key)
                }  # fmt: skip
                yield _Number(
                    name,
                    float(getattr(use.parameters, name)),
                    bounds.get("ge", bounds.get("gt")),
                    bounds.get("le", bounds.get("lt")),
                    field.annotation is int,
                )
