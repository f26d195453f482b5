"""The arithmetic behind benchmarks/forgetting.py: fronts, hypervolume, normalised scores, intervals, and the ways."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ktmerge.errors import UsageError
from ktmerge.merge.registry import methods
from ktmerge.merge.settings import blend_setting
from ktmerge.recipes.schema import Blend
from ktmerge.sweep.pareto import front

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from paths import COARSE, Way, knob_of, line
from tradeoff import Resamples, Sides, harmonic, hypervolume, interval


def test_hypervolume_is_the_area_under_the_staircase() -> None:
    points = np.array([[1.0, 0.0], [0.9, 0.3], [0.5, 0.8], [0.0, 1.0], [0.4, 0.4]])
    assert hypervolume(points) == pytest.approx(0.9 * 0.3 + 0.5 * 0.5)
    assert hypervolume(points[::-1]) == pytest.approx(hypervolume(points))
    assert hypervolume(np.array([[-1.0, 3.0], [2.0, -1.0]])) == 0
    assert hypervolume(np.array([[1.2, 1.1]])) == pytest.approx(1.32)


def test_hypervolume_of_many_draws_is_that_of_each() -> None:
    points = np.random.default_rng(0).normal(0.4, 0.4, (6, 2, 50))
    grid = np.linspace(0, 2, 401)[:-1] + 0.0025
    for draw in range(5):
        kept = np.maximum(points[:, :, draw], 0)
        covered = ((kept[:, 0, None, None] > grid[:, None]) & (kept[:, 1, None, None] > grid)).any(0).mean() * 4
        assert hypervolume(points)[draw] == pytest.approx(covered, abs=0.01)


def test_front_leaves_out_what_is_beaten() -> None:
    assert front(np.array([[1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.0, 1.0], [0.5, 0.5]])) == [0, 1, 3, 4]


def test_harmonic_mean_needs_both_sides() -> None:
    assert harmonic(np.array([0.5, 0.0, -1.0]), np.array([0.5, 1.0, 1.0])).tolist() == [0.5, 0.0, 0.0]


def sides(draws: int = 200) -> Sides:
    generator = np.random.default_rng(1)

    def items(up: float, a: float, b: float) -> dict[str, np.ndarray]:
        return {name: generator.normal(mean, 5.0, 60) for name, mean in {"up": up, "a": a, "b": b}.items()}

    base, experts = items(80, 10, 20), {"a": items(40, 60, 20), "b": items(50, 10, 90)}
    return Sides(("up",), ("a", "b"), base, experts, Resamples.of({"up": 60, "a": 60, "b": 60}, draws))


def test_scores_lie_between_the_base_and_each_tasks_own_expert() -> None:
    found = sides()
    up, down = found.normalised(found.base)
    assert up == pytest.approx(np.ones(201))
    assert down == pytest.approx(np.zeros(201), abs=1e-12)
    best = {"up": found.base["up"], "a": found.experts["a"]["a"], "b": found.experts["b"]["b"]}
    assert found.normalised(best)[1] == pytest.approx(np.ones(201))
    middle = {"up": (found.experts["a"]["up"] + found.experts["b"]["up"]) / 2, "a": best["a"], "b": found.base["b"]}
    up, down = found.normalised(middle)
    assert up == pytest.approx(np.zeros(201), abs=1e-12)
    assert down == pytest.approx(np.full(201, 0.5))


def test_gains_are_points_against_the_base() -> None:
    found = sides(draws=1)
    best = {"up": found.base["up"] - 8, "a": found.base["a"] + 10, "b": found.base["b"] + 20}
    gains = {key: float(values[0]) for key, values in found.gains(best).items()}
    assert (gains["E"], gains["F"], gains["O"]) == pytest.approx((15, -8, 7))
    up, down = float(found.base["up"].mean()) - 8, float(found.base["a"].mean() + found.base["b"].mean()) / 2 + 15
    assert gains["H"] == pytest.approx(2 * up * down / (up + down))


def test_resamples_pair_models_so_that_a_constant_difference_has_no_spread() -> None:
    found = sides()
    better = {name: values + 3 for name, values in found.base.items()}
    difference = found.raw(better)[0] - found.raw(found.base)[0]
    assert interval(difference) == pytest.approx((3, 3, 3))
    estimate, low, high = interval(found.raw(found.base)[0])
    error = found.base["up"].std() / 60**0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert low < estimate < high


def test_a_way_is_halved_evenly_or_by_factors() -> None:
    assert line(0.5).values == pytest.approx((0.1, 0.225, 0.35, 0.5))
    assert line(0.5).between(0.2, 0.4) == pytest.approx(0.3)
    assert Way("kappa", (1.0, 4.0), None, even=False).between(1.0, 4.0) == pytest.approx(2.0)


@pytest.mark.parametrize("name", methods())
def test_values_of_a_knob_are_ones_the_method_takes(name: str) -> None:
    knob = knob_of(methods()[name])
    if knob is None:
        return
    assert len(set(knob.values)) == COARSE
    assert all(abs(value) <= 1000 for value in knob.values)  # not the last numbers that are taken at all
    assert list(knob.values) == sorted(knob.values) or knob.start is not None
    taken = 0
    for value in knob.values:
        try:
            blend_setting(Blend(method=name, **{knob.name: value}))  # type: ignore[arg-type]
            taken += 1
        except UsageError:
            continue
    assert taken >= COARSE // 2
