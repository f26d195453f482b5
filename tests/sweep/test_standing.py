"""Paired differences, who is stopped, who goes on, and the curve of a knob."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ktmerge.errors import UsageError
from ktmerge.sweep.candidates import Candidate, best_keeping, finalists
from ktmerge.sweep.curve import Curve
from ktmerge.sweep.pareto import layers
from ktmerge.sweep.rounds import ScoredSet
from ktmerge.sweep.sampling import CurveSampler, next_share
from ktmerge.sweep.space import Range
from ktmerge.sweep.standing import objectives, paired, stopped

SETS = {
    "up": ScoredSet("upstream", range(40)),
    "down": ScoredSet("downstream", range(40)),
    "other": ScoredSet("upstream", range(40)),
}


def scores(up: float, down: float, n: int = 40, seed: int = 0) -> dict[str, list[float]]:
    """Right or wrong answers with these chances, the same luck for everybody."""
    luck = np.random.default_rng(seed).random((3, n))
    return {
        name: (luck[i] < chance).astype(float).tolist()
        for i, (name, chance) in enumerate(zip(SETS, (up, down, up), strict=True))
    }


def test_a_paired_difference_is_that_of_the_means_with_one_item_more_in_its_variance() -> None:
    a, b = scores(0.8, 0.5), scores(0.6, 0.5, seed=0)
    found = paired(a, b, SETS, "upstream")
    own = [np.array(a[name]) - np.array(b[name]) for name in ("up", "other")]
    assert found.value == pytest.approx(100 * np.mean([one.mean() for one in own]))
    expected = [100**2 * (one.var() * 40 + 0.25) / 40**2 for one in own]
    assert found.error == pytest.approx(np.sqrt(sum(expected)) / 2)
    assert paired(a, a, SETS, "downstream").error > 0  # equal items prove little


def in_chunks(own: dict[str, list[float]], times: int) -> dict[str, list[float]]:
    """Every text of a set as so many chunks with its score."""
    return {name: np.repeat(scores, times).tolist() for name, scores in own.items()}


def test_chunks_of_one_text_count_as_that_text() -> None:
    a, b = scores(0.8, 0.5), scores(0.6, 0.5)
    sets = {name: ScoredSet(one.side, np.repeat(one.groups, 5).tolist()) for name, one in SETS.items()}
    whole, found = paired(a, b, SETS, "upstream"), paired(in_chunks(a, 5), in_chunks(b, 5), sets, "upstream")
    assert (found.value, found.error) == pytest.approx((whole.value, whole.error))
    uneven = paired({"up": [1.0, 0.5, 0.0]}, {"up": [0.0] * 3}, {"up": ScoredSet("upstream", [7, 7, 9])}, "upstream")
    assert uneven.error == pytest.approx(100 * np.sqrt((1.5 - 2 * 0.5) ** 2 + (0 - 0.5) ** 2 + 1.5**2 / 4) / 3)
    wrong = {name: [0.0] * 20 for name in SETS}  # of four chunks each of five texts
    right = {name: [1.0] * 20 for name in SETS}
    assert stopped(wrong, right, None, SETS, 0.99, 2) == "keeps too little"
    texts = {name: ScoredSet(one.side, np.repeat(range(5), 4).tolist()) for name, one in SETS.items()}
    assert stopped(wrong, right, None, texts, 0.99, 2) is None


def test_who_keeps_just_enough_does() -> None:
    for right in range(1, 41):
        for kept in range(right + 1):
            if 100 * kept % right == 0:
                base, own = ([1.0] * count + [0.0] * (40 - count) for count in (right, kept))
                kept_percent, _ = objectives({"up": own, "down": own}, {"up": base, "down": base}, SETS)
                assert kept_percent == 100 * kept // right


def test_objectives_compare_on_common_items() -> None:
    base, own = scores(0.9, 0.1), scores(0.9, 0.8)
    few = {name: one[:10] for name, one in own.items()}
    retention, gain = objectives(few, base, SETS)
    assert retention == 100
    assert gain == pytest.approx(100 * (np.mean(own["down"][:10]) - np.mean(base["down"][:10])))
    with pytest.raises(UsageError, match="nothing to keep"):
        objectives(own, scores(0.0, 0.5), SETS)


def test_only_the_clearly_worse_are_stopped() -> None:
    base, best = scores(0.9, 0.1), scores(0.9, 0.9)
    assert stopped(scores(0.2, 0.9), base, None, SETS, 0.99, 2) == "keeps too little"
    assert stopped(scores(0.9, 0.2), base, best, SETS, 0.99, 2) == "gains too little"
    assert stopped(scores(0.9, 0.2), base, None, SETS, 0.99, 2) is None  # nobody is known to do better
    assert stopped(scores(0.85, 0.85), base, best, SETS, 0.99, 2) is None
    few = {name: own[:3] for name, own in scores(0.2, 0.2).items()}
    assert stopped(few, base, best, SETS, 0.99, 2) is None  # three items prove nothing
    keeping = scores(0.95, 0.2)
    assert stopped(keeping, scores(0.95, 0.1), scores(0.3, 0.9), SETS, 0.2, 2) is None  # it keeps clearly more


def candidate(number: int, first: float, second: float, stopped: str | None = None, recipe: object = None) -> Candidate:
    return Candidate(number, {}, {"r": number if recipe is None else recipe}, first, second, stopped, [])


def test_the_front_and_what_is_nearest_to_the_limit_goes_on() -> None:
    field = [
        candidate(0, 103, 10), candidate(1, 100, 40), candidate(2, 98, 60), candidate(3, 80, 90), candidate(4, 60, 95),
        candidate(5, 99, 20), candidate(6, 100, 40, recipe=1), candidate(7, 200, 200, stopped="keeps too little"),
    ]  # fmt: skip
    assert [one.number for one in finalists(field, 9, 99)] == [0, 1, 2, 3, 4, 5]
    assert [one.number for one in finalists(field, 3, 99)] == [0, 1, 2]
    assert [one.number for one in finalists(field, 2, 99)] == [1, 2]
    assert [one.number for one in finalists(field, 3, None)] == [0, 2, 4]
    assert finalists([field[-1]], 3, 99) == [field[-1]]  # all were stopped: still, the best of them is reported
    assert finalists([], 3, 99) == []
    best = best_keeping(field, 99)
    assert best is not None
    assert best.number == 1
    assert best_keeping(field, 104) is None


def test_layers_peel_fronts() -> None:
    assert list(layers(np.array([[1, 1], [2, 2], [0, 3], [1, 2], [0, 0]]))) == [[1, 2], [3], [0], [4]]
    points = np.random.default_rng(0).integers(0, 9, (2000, 2)).astype(float)
    first = next(layers(points))
    rest = np.setdiff1d(np.arange(len(points)), first)
    beaten = [bool(((points >= one).all(1) & (points > one).any(1)).any()) for one in points]
    assert not any(beaten[i] for i in first)
    assert all(beaten[i] for i in rest)
    assert sorted(i for layer in layers(points) for i in layer) == list(range(2000))


def test_a_curve_is_monotone_through_noise_and_finds_the_crossing() -> None:
    knob = np.linspace(0, 1, 9)
    noise = np.array([0, 1, -1, 1, -1, 1, -1, 0, 0])
    curve = Curve(knob, 100 - 20 * knob**2 + noise)
    values = [curve.at(one) for one in curve.grid(200)]
    assert all(a >= b - 1e-9 for a, b in pairwise(values))
    (crossing,) = Curve(knob, 100 - 20 * knob**2).crossings(95)
    assert crossing == pytest.approx(0.5, abs=0.01)
    assert Curve([0.3], [7.0]).at(0.9) == 7
    assert Curve([0, 0, 1], [1, 3, 5]).at(0) == 2


def test_the_knob_is_bracketed_first_and_then_tried_where_the_limit_is() -> None:
    taken: list[float] = []
    for _ in range(12):
        values = [(100 - 20 * share**2, 50 * share) for share in taken]
        taken.append(next_share(taken, values, taken, 92))
    assert taken[:4] == [1.0, 0.5, 0.25, 0.75]
    assert min(abs(one - 0.4**0.5) for one in taken[4:]) < 0.02
    assert len({round(one, 2) for one in taken}) == 12


def test_workers_that_begin_before_anything_is_scored_divide_the_knob() -> None:
    taken: list[float] = []
    for _ in range(9):
        taken.append(next_share([], [], taken, 92))
    assert taken[4:] == [0.125, 0.375, 0.625, 0.875, 0.0625]


@pytest.mark.parametrize("knob", [Range("x", 1, 3, integer=True), Range("x", 1, 8, log=True, integer=True)])
def test_a_whole_number_is_tried_at_each_of_its_values(knob: Range) -> None:
    sampler = CurveSampler(knob, 92.0)
    taken: list[float] = []
    for _ in range(9):
        taken.append(next_share([], [], taken, 92.0, sampler._nearest))
    assert {knob.at(share) for share in taken} == set(range(1, int(knob.high) + 1))
