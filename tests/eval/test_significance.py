"""Tests of chance against values worked out by hand or by simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from ktmerge.errors import UsageError
from ktmerge.eval.partition import Share, partition
from ktmerge.eval.results import Results
from ktmerge.eval.significance import detectable, holm, luck, mcnemar


def test_mcnemar_is_a_coin_thrown_for_every_discordant_item() -> None:
    a, b = np.array([1.0] * 9 + [0] + [1] * 5 + [0] * 5), np.array([0.0] * 9 + [1] + [1] * 5 + [0] * 5)
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (9, 1)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(b, a).p == found.p
    assert mcnemar(a, a).p == 1


def test_mcnemar_of_many_items_is_the_exact_tail() -> None:
    a = np.array([1.0] * 1060 + [0.0] * 940)
    assert mcnemar(a, 1 - a).p == pytest.approx(2 * sum(comb(2000, k) for k in range(941)) / 2**2000, rel=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_detectable_difference_is_seen_four_times_in_five() -> None:
    generator = np.random.default_rng(0)
    error = 1.3
    seen = np.abs(generator.normal(detectable(error), error, 100_000)) > 1.959964 * error
    assert seen.mean() == pytest.approx(0.8, abs=0.005)


def test_the_best_of_many_equals_looks_better_than_it_is() -> None:
    generator = np.random.default_rng(0)
    for candidates in (2, 5, 24):
        best = generator.normal(0, 2.0, (40_000, candidates)).max(axis=1).mean()
        assert luck(candidates, 2.0) == pytest.approx(best, rel=0.05)
    assert luck(1, 2.0) == 0


def test_the_partition_counts_what_tuning_changed() -> None:
    base, tuned, own = np.array([1.0, 1, 1, 1, 0]), np.array([1.0, 1, 0, 0, 1]), np.array([1.0, 0, 1, 0, 1])
    down = np.array([0.0, 0, 1]), np.array([1.0, 1, 1]), np.array([1.0, 0, 0])
    found = partition([(base, tuned, own)], [down])
    assert (found.preserved, found.healed, found.damaged) == (Share(1, 2), Share(1, 2), Share(2, 4))
    assert found.retained == Share(1, 2)
    back = partition([(base, tuned, base)], [(down[0], down[1], down[0])])
    assert back.healed.percent == 100
    assert back.retained.percent == 0, "going back to the base heals all and retains nothing"
    assert partition([], [down]).healed.percent is None


SCORES = {
    "base": {"up": [1.0, 1, 1, 0] * 10, "down": [0.0, 0, 1, 0] * 10},
    "tuned": {"up": [1.0, 0, 0, 0] * 10, "down": [1.0, 1, 1, 1] * 10},
    "blend": {"up": [1.0, 1, 0, 0] * 10, "down": [1.0, 1, 1, 0] * 10},
}


def test_results_tell_partition_mcnemar_and_cautions(make_results: Callable[..., Results]) -> None:
    results = make_results(SCORES, reference="tuned")
    shares = results.partition("blend")
    assert shares is not None
    assert (shares.healed, shares.retained) == (Share(10, 20), Share(20, 30))
    assert results.mcnemar("blend", "tuned")["down"].p == pytest.approx(2 / 2**10)
    document = results.to_json()
    assert document["models"]["blend"]["summary"]["partition"]["damaged"] == {"count": 10, "total": 30}
    assert document["differences"][0]["mcnemar"]["up"]["only_b"] == 10
    assert Results.from_json(document, "x").partition("blend") == shares
    error = 100 * np.std([0, -1, -1, 0] * 10, ddof=1) / np.sqrt(40)
    assert f"up: with 40 items above {detectable(float(error)):.1f} points" in document["cautions"][0]
    assert make_results(SCORES).partition("blend") is None
    graded = [replace(task, metric="f1") if task.name == "up" else task for task in results.tasks]
    assert list(replace(results, tasks=graded).mcnemar("blend", "tuned")) == ["down"], "only of right and wrong"


def test_mcnemar_is_of_sets_with_nothing_between_right_and_wrong(make_results: Callable[..., Results]) -> None:
    scores = {"base": {"up_a": [1, 0, 1], "up_b": [0.3, 0, 1]}, "tuned": {"up_a": [0, 0, 1], "up_b": [1, 1, 1]}}
    results = make_results(scores)
    found = [replace(task, metric="prompt_strict" if task.name == "up_a" else "exact_match") for task in results.tasks]
    assert list(replace(results, tasks=found).mcnemar("tuned", "base")) == ["up_a"]


def test_many_candidates_are_spoken_of(make_results: Callable[..., Results]) -> None:
    few = make_results(SCORES)
    many = make_results(SCORES | {f"b{i}": SCORES["blend"] for i in range(4)})
    assert not any("candidates" in said for said in few.cautions)
    assert any(said.startswith("6 candidates were scored") for said in many.cautions)
    assert any("--part report" in said for said in make_results(SCORES, part="selection").cautions)


def test_backward_transfer(make_results: Callable[..., Results]) -> None:
    def right(n: int) -> list[float]:
        return [1.0] * n + [0.0] * (10 - n)

    R = [[8, 2, 1], [5, 9, 3], [6, 7, 9]]
    scores = {f"s{i}": {f"down{j}": right(n) for j, n in enumerate(row)} for i, row in enumerate(R)}
    results = make_results({"base": {f"down{j}": right(1) for j in range(3)}, **scores})
    found = results.sequence({f"s{i}": f"down{i}" for i in range(3)})
    assert found.scores == [[10.0 * n for n in row] for row in R]
    assert found.bwt.value == pytest.approx(((60 - 80) + (70 - 90)) / 2)
    assert found.forgetting.value == pytest.approx(((80 - 60) + (90 - 70)) / 2)
    assert found.bwt.low < found.bwt.value < found.bwt.high
    with pytest.raises(UsageError, match="Did you mean 'down0'"):
        results.sequence({"s0": "donw0", "s1": "down1"})
    with pytest.raises(UsageError, match="at least two stages"):
        results.sequence({"s0": "down0"})


def test_few_items_are_warned_of(make_results: Callable[..., Results]) -> None:
    made = make_results({name: {"up_few": [1, 0, 1], "down_many": [1, 0] * 5} for name in ("base", "tuned")})
    assert any("Fewer than 10 items, texts or images (up_few): a bootstrap of so few" in one for one in made.cautions)
    alone = make_results({"base": {"up_few": [1, 0, 1]}})
    assert not any("Fewer" in one for one in alone.cautions)


def test_chunks_of_a_text_count_together(make_results: Callable[..., Results]) -> None:
    """Twelve texts of five chunks each, all chunks of a text alike: what is known of twelve, not of sixty."""
    texts = [[0.2, 0.4], [0.3, 0.3], [0.5, 0.4]] * 4
    chunks = {name: {"up": [text[i] for text in texts for _ in range(5)]} for i, name in enumerate(("base", "tuned"))}
    rows = [row for row in range(12) for _ in range(5)]
    results = make_results(chunks)
    results.tasks[0] = replace(results.tasks[0], kind="text", metric="next_token_accuracy", rows=rows)
    plain = make_results({name: {"up": own["up"][::5]} for name, own in chunks.items()})
    F, known = (one.summary.models["tuned"].F for one in (results, plain))
    assert F is not None
    assert known is not None
    assert (F.value, F.low, F.high) == pytest.approx((known.value, known.low, known.high))
    document = results.to_json()
    assert document["models"]["base"]["tasks"]["up"]["stderr"] == pytest.approx(plain.stderr("base", plain.tasks[0]))
    assert results.drawn == "items, those of one text or image together"
    assert [said.replace("60 items", "12 items") for said in results.cautions] == plain.cautions
    results.tasks[0] = replace(results.tasks[0], rows=[0] * 60)
    assert any(
        "One text or image alone (up): intervals are over its items" in said for said in replace(results).cautions
    )


def test_questions_on_one_image_count_together(make_results: Callable[..., Results]) -> None:
    """Ten images of three questions each, all alike: as wide as for ten; and no test that takes them for thirty."""
    images = {"base": [1, 0] * 5, "tuned": [1, 1, 0, 0, 1] * 2}
    asked = make_results({name: {"up": [score for score in own for _ in range(3)]} for name, own in images.items()})
    asked.tasks[0] = replace(asked.tasks[0], clusters=[3 * image for image in range(10) for _ in range(3)])
    known = make_results({name: {"up": own} for name, own in images.items()})
    assert asked.summary.models["tuned"].F == known.summary.models["tuned"].F
    assert known.mcnemar("base", "tuned").keys() == {"up"}
    assert not asked.mcnemar("base", "tuned")
    assert Results.from_json(asked.to_json(), "x").tasks == asked.tasks
