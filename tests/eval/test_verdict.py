from __future__ import annotations

from collections.abc import Callable

import pytest

from ktmerge.eval.results import Results
from ktmerge.eval.verdict import specialist_share, verdict

Make = Callable[..., Results]


def scores(**models: tuple[int, int]) -> dict[str, dict[str, list[float]]]:
    """Per model how many of 100 upstream and downstream items are right; nested, so that pairs differ cleanly."""
    return {
        name: {"up_a": [1.0] * up + [0.0] * (100 - up), "down_b": [1.0] * down + [0.0] * (100 - down)}
        for name, (up, down) in models.items()
    }


def said(results: Results, *tuned: str) -> str:
    return " ".join(verdict(results, tuned)).replace("\N{NO-BREAK SPACE}", " ")


def test_a_blend_that_keeps_both(make_results: Make) -> None:
    results = make_results(scores(base=(80, 20), tuned=(50, 90), half=(79, 80), third=(80, 40)))
    text = said(results, "tuned")
    assert text.startswith("The best blend of 2, 'half', gains 60.0 points")
    assert "forgets nothing that can be told from chance on upstream sets, -1.0 points" in text
    assert "it keeps 98.8 % of the base's upstream score" in text
    assert "The fine-tune 'tuned' gains 70.0 points" in text
    assert "forgets 30.0 points" in text
    assert "It loses most on up_a: -30.0 points" in text
    assert "'half' is ahead of the fine-tune 'tuned' by 19.0 points" in text
    assert "It has 86 % of the downstream gain of 'tuned'." in text


def test_each_fine_tune_is_held_against_the_blend_that_forgets_less_and_learned_as_much(make_results: Make) -> None:
    models = {"base": (80, 20), "tuned": (50, 60), "same": (70, 60), "more": (65, 90), "less": (80, 40)}
    text = said(make_results(scores(**models)), "tuned")
    assert "Against 'tuned', 'same' stands at +0.0 points [0.0 to 0.0] on down_b, which may be nothing," in text
    assert "and keeps 20.0 points" in text
    del models["same"]
    assert "Against 'tuned', 'more' stands at +30.0 points" in said(make_results(scores(**models)), "tuned")
    del models["more"]
    assert "Against" not in said(make_results(scores(**models)), "tuned")


def test_a_gain_on_another_set_does_not_make_up_for_what_a_fine_tune_learned(make_results: Make) -> None:
    def model(up: int, a: int, b: int) -> dict[str, list[float]]:
        counts = {"up": up, "down_a": a, "down_b": b}
        return {name: [1.0] * count + [0.0] * (100 - count) for name, count in counts.items()}

    found = {"base": model(80, 0, 0), "a": model(50, 80, 0), "a-back": model(70, 79, 0), "b-back": model(79, 0, 95)}
    assert "Against 'a', 'a-back' stands at -1.0 points" in said(make_results(found), "a")


def test_a_blend_that_is_worse_is_called_so(make_results: Make) -> None:
    text = said(make_results(scores(base=(80, 20), tuned=(79, 90), half=(40, 30))), "tuned")
    assert "'half' is behind the fine-tune 'tuned' by" in text
    assert "ahead" not in text


def test_what_cannot_be_told_apart_is_not(make_results: Make) -> None:
    text = said(make_results(scores(base=(80, 20), tuned=(70, 60), half=(71, 60))), "tuned")
    assert "cannot be told apart" in text
    assert "ahead" not in text
    assert "behind" not in text


def test_losses_downstream_are_losses(make_results: Make) -> None:
    assert "loses 15.0 points" in said(make_results(scores(base=(50, 50), m=(60, 35))))
    assert "'m' loses" in said(make_results(scores(base=(50, 50), m=(60, 35))))


@pytest.mark.parametrize("side", ["up", "down"])
def test_one_side(make_results: Make, side: str) -> None:
    both = scores(base=(80, 20), tuned=(50, 90), half=(79, 80))
    text = said(make_results({m: {t: s for t, s in v.items() if t.startswith(side)} for m, v in both.items()}), "tuned")
    assert ("forgets" in text) == (side == "up")
    assert ("gains" in text) == (side == "down")
    assert "O =" not in text


def test_only_the_base_or_no_blend(make_results: Make) -> None:
    assert "Only the base" in said(make_results(scores(base=(80, 20))))
    assert said(make_results(scores(base=(80, 20), tuned=(50, 90))), "tuned").startswith("The fine-tune 'tuned'")


def test_the_share_is_of_the_best_specialist_on_each_set(make_results: Make) -> None:
    def right(count: int) -> list[float]:
        return [1.0] * count + [0.0] * (10 - count)

    results = make_results(
        {
            "base": {"down_a": right(2), "down_b": right(1)},
            "a": {"down_a": right(10), "down_b": right(0)},
            "b": {"down_a": right(1), "down_b": right(9)},
            "both": {"down_a": right(8), "down_b": right(7)},
        }
    )
    assert specialist_share(results, "both", ["a", "b"]) == pytest.approx(100 * (6 + 6) / (8 + 8))
    assert specialist_share(results, "both", ["base"]) is None
