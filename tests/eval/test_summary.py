"""E, F, O, H and the rest on numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval.results import Results
from ktmerge.eval.summary import FORMULAS, Estimate

Make = Callable[..., Results]


def items(percent: int) -> list[float]:
    """Ten items of which ``percent`` / 10 are right."""
    return [1.0] * (percent // 10) + [0.0] * (10 - percent // 10)


def by_hand() -> dict[str, dict[str, list[float]]]:
    return {
        "base": {"up_a": items(80), "up_b": items(40), "down_c": items(20)},
        "tuned": {"up_a": items(50), "up_b": items(50), "down_c": items(90)},
        "half": {"up_a": items(70), "up_b": items(40), "down_c": items(60)},
    }


def test_the_numbers(make_results: Make) -> None:
    summaries = make_results(by_hand(), reference="tuned").summary.models
    tuned, half, base = summaries["tuned"], summaries["half"], summaries["base"]
    expected = {
        "d": (20, 90, 60),
        "u": (60, 50, 55),
        "E": (0, 70, 40),
        "F": (0, -10, -5),
        "O": (0, 60, 35),
        "avg": (40, 70, 57.5),
        "H": (2 * 20 * 60 / 80, 2 * 90 * 50 / 140, 2 * 60 * 55 / 115),
        "retention": (100, 100 * 50 / 60, 100 * 55 / 60),
        "gain_share": (0, 100, 100 * 40 / 70),
    }
    for key, values in expected.items():
        for summary, value in zip((base, tuned, half), values, strict=True):
            estimate = getattr(summary, key)
            assert estimate.value == pytest.approx(value), key
            assert estimate.low <= estimate.value + 1e-9
            assert estimate.high >= estimate.value - 1e-9
    assert tuned.worst is not None
    assert (tuned.worst.task, tuned.worst.difference.value) == ("up_a", pytest.approx(-30))
    assert {task: one.value for task, one in tuned.differences.items()} == pytest.approx(
        {"up_a": -30, "up_b": 10, "down_c": 70}
    )
    assert set(expected) - {"d", "u"} <= set(FORMULAS)


def test_the_mean_is_over_sets_not_over_items(make_results: Make) -> None:
    results = make_results(
        {"base": {"up_a": [0.0] * 90, "up_b": [0.0] * 10}, "m": {"up_a": [0.0] * 90, "up_b": [1.0] * 10}}
    )
    F = results.summary.models["m"].F
    assert F is not None
    assert F.value == pytest.approx(50)


def test_differences_of_two_models(make_results: Make) -> None:
    compared = make_results(by_hand()).difference("tuned", "half")
    assert compared.numbers["E"].value == pytest.approx(30)
    assert compared.numbers["F"].value == pytest.approx(-5)
    assert compared.numbers["O"].value == pytest.approx(25)
    assert compared.numbers["H"].value == pytest.approx(2 * 90 * 50 / 140 - 2 * 60 * 55 / 115)
    assert compared.tasks["up_a"].value == pytest.approx(-20)
    mirrored = make_results(by_hand()).difference("half", "tuned").numbers["O"]
    assert (mirrored.value, mirrored.low) == (pytest.approx(-25), pytest.approx(-compared.numbers["O"].high))


def test_a_model_against_itself_is_exactly_nothing(make_results: Make) -> None:
    scores = by_hand()
    results = make_results({**scores, "copy": scores["base"]})
    summary = results.summary.models["copy"]
    assert summary.E == summary.F == summary.O == Estimate(0.0, 0.0, 0.0)
    assert results.difference("tuned", "tuned").numbers["H"] == Estimate(0.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="Did you mean 'tuned'"):
        results.difference("tuned", "tund")


@pytest.mark.parametrize(("side", "has", "lacks"), [("up", "F", "E"), ("down", "E", "F")])
def test_one_side_only(make_results: Make, side: str, has: str, lacks: str) -> None:
    scores = {model: {t: s for t, s in tasks.items() if t.startswith(side)} for model, tasks in by_hand().items()}
    summary = asdict(make_results(scores).summary.models["tuned"])
    assert summary[has] is not None
    assert all(summary[key] is None for key in (lacks, "O", "H", "avg", "gain_share"))
    assert (summary["worst"] is None) == (side == "down")


def test_undefined_numbers_are_none_not_errors(make_results: Make) -> None:
    zero: dict[str, Any] = {"up_a": [0.0] * 5, "down_c": [0.0] * 5}
    results = make_results({"base": zero, "m": zero}, reference="m")
    summary = results.summary.models["m"]
    assert summary.retention is None
    assert summary.gain_share is None
    harmonic = summary.H
    assert harmonic == Estimate(0.0, 0.0, 0.0)


def test_intervals_are_paired_and_seeded(make_results: Make) -> None:
    """A model that differs from the base on few items has a narrow interval, whatever the items' own spread."""
    base = [1.0, 0.0] * 100
    other = base.copy()
    other[1] = other[3] = 1.0
    make = {"base": {"up_a": base, "down_b": base}, "m": {"up_a": other, "down_b": base}}
    F = make_results(make).summary.models["m"].F
    assert F is not None
    assert F.value == pytest.approx(1)
    assert 0 <= F.low < F.high <= 3  # unpaired it would be +-10
    assert make_results(make).summary.models["m"] == make_results(make).summary.models["m"]
    assert make_results(make, seed=1).summary.models["m"] != make_results(make).summary.models["m"]
