"""One method on one part of one world: blended in place along its ways, scored, and kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from parts import BASE, Part, Point, keep, kept, plain, sides_of
from paths import COARSE, FINE, Way, knob_of, line
from tradeoff import Sides, harmonic, hypervolume
from worlds.world import REPORT, SELECT

import ktmerge
from ktmerge.errors import KtmergeError
from ktmerge.merge.registry import find_method
from ktmerge.recipes.load import parse_recipe
from ktmerge.sweep.pareto import front

LAMBDA = "lambda"
CLOSE = 0.8
"""A way is gone on with if its first points cover at least this share of what the best way's cover."""


def sweep(part: Part, method: str) -> None:
    """Blend and score a method along its ways; keep the better way, and why points were refused."""
    if kept(part, method) is not None:
        return
    started = time.perf_counter()
    sides = sides_of(part, SELECT)
    refused: list[str] = []
    ways: list[tuple[Way, list[Point]]] = []
    for way in _ways(part, method, refused):
        points = [point for value in way.values if (point := _tried(part, method, way, value, refused)) is not None]
        if points:
            ways.append((way, points))
    best = max((area(sides, points) for _, points in ways), default=0.0)
    refined = [
        _refined(part, method, way, points, refused) for way, points in ways if area(sides, points) >= CLOSE * best
    ]
    points = max(refined, key=lambda one: area(sides, one), default=[])
    for point in kept_front(sides, points):
        point[REPORT] = plain(part.world.score(_blended(part, point["blend"]), REPORT, part.sets))
    keep(part, method, {"points": points, "refused": refused, "seconds": time.perf_counter() - started})


def _refined(part: Part, method: str, way: Way, points: Sequence[Point], refused: list[str]) -> list[Point]:
    """The way with as many points more as the budget has left."""
    sides, found = sides_of(part, SELECT), list(points)
    for _ in range(COARSE + FINE - len(points)):
        point = _tried(part, method, way, widest(sides, way, found), refused)
        if point is None:
            break
        found = sorted([*found, point], key=lambda one: one["value"])
    return found


def widest(sides: Sides, way: Way, points: Sequence[Point]) -> float:
    """Where on the way the next point goes: into the middle of the largest step of the staircase so far."""
    values = [point["value"] for point in points]
    places = [np.maximum(place[:, 0], 0) for place in _places(sides, points)]
    if way.start is not None:
        values, places = [way.start, *values], [np.array([1.0, 0.0]), *places]
    if len(values) == 1:
        return values[0] / 2
    steps = [float(np.prod(np.abs(first - second))) for first, second in pairwise(places)]
    at = int(np.argmax(steps))
    return way.between(values[at], values[at + 1])


def chosen(sides: Sides, points: Sequence[Point]) -> Point:
    """The point of a front with the largest harmonic mean of u and d on the selection split; of equals the first."""
    return max(points, key=lambda point: float(harmonic(*sides.normalised(_arrays(point[SELECT])))[0]))


def kept_front(sides: Sides, points: Sequence[Point]) -> list[Point]:
    """The points that no other point of the way beats on the selection split."""
    return [points[i] for i in front(_places(sides, points)[:, :, 0])]


def area(sides: Sides, points: Sequence[Point]) -> float:
    """Hypervolume of a way on the selection split."""
    return float(hypervolume(_places(sides, points))[0])


def _places(sides: Sides, points: Sequence[Point]) -> Any:
    return np.array([sides.normalised(_arrays(point[SELECT])) for point in points]).reshape(len(points), 2, -1)


def _ways(part: Part, method: str, refused: list[str]) -> Iterator[Way]:
    knob = knob_of(find_method(method))
    if knob is not None:
        yield knob
    try:
        yield line(_unit(part, method))
    except KtmergeError as error:
        refused.append(f"{LAMBDA}: {error}")


def _tried(part: Part, method: str, way: Way, value: float, refused: list[str]) -> Point | None:
    """One point, scored on the selection split; None if the blend was refused."""
    blend = {"method": method, way.name: value}
    try:
        model = _blended(part, blend)
    except KtmergeError as error:
        refused.append(f"{way.name} {value:g}: {error}")
        return None
    return {"way": way.name, "value": value, "blend": blend, SELECT: plain(part.world.score(model, SELECT, part.sets))}


def _unit(part: Part, method: str) -> float:
    """The lambda at which the merged model is as far from the base as its experts are on average."""
    base = _weights(part, BASE)
    merged = dict(_blended(part, {"method": method, "lambda": 1.0}).state_dict())
    mean = float(np.mean([_distance(base, _weights(part, name)) for name in part.experts]))
    distance = _distance(base, merged)
    return mean / distance if distance else 1.0


def _distance(base: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    squares = sum(float((other[name].double() - values.double()).square().sum()) for name, values in base.items())
    return math.sqrt(squares)


@lru_cache(maxsize=8)
def _weights(part: Part, name: str) -> dict[str, Any]:
    return {key: values.detach().clone() for key, values in part.world.load(part.models / name).state_dict().items()}


@lru_cache(maxsize=1)
def _live(part: Part) -> tuple[Any, Any]:
    return part.world.load(part.models / BASE), ktmerge.Pristine()


def _blended(part: Part, blend: Mapping[str, Any]) -> Any:
    """The live model with the blend's weights."""
    model, sources = _live(part)
    document = {
        "ktmerge": 1,
        "base": str(part.models / BASE),
        "statistics": part.statistics(BASE),
        "experts": {
            name: {"model": str(part.models / name), "statistics": part.statistics(name)} for name in part.experts
        },
        "blend": dict(blend),
        "seed": part.seed,
    }
    ktmerge.blend_into(model, parse_recipe(document, str(blend["method"]), part.models), sources)
    return model


def _arrays(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(values) for name, values in scores.items()}
