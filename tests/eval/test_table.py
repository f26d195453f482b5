from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from ktmerge.eval.results import Results
from ktmerge.eval.summary import Estimate
from ktmerge.eval.table import with_interval

Make = Callable[..., Results]


def printed(renderable: object, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def many(models: int) -> dict[str, dict[str, list[float]]]:
    tasks = {"up_capitals": 5, "up_prose": 6, "up_python": 3, "down_spam": 2, "down_reviews": 4}
    return {
        "base" if m == 0 else f"model-{m}": {
            t: [1.0] * ((n * (m + 2)) % 10) + [0.0] * (10 - (n * (m + 2)) % 10) for t, n in tasks.items()
        }
        for m in range(models)
    }


@pytest.mark.every(5)
@pytest.mark.parametrize("models", [1, 2, 3, 8])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_nothing_is_cut_or_wrapped_at_any_width(make_results: Make, models: int, width: int) -> None:
    results = make_results(many(models))
    text = printed(results.table(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    words = text.split()
    for name in results.models:
        assert name in words
        for score in results.scores[name].values():
            assert f"{score.mean:.1f}" in words
        for number in (results.summary.models[name].E, results.summary.models[name].O):
            if name != "base":
                assert with_interval(number) in text
    assert "O = E + F" in text or models == 1


def test_narrow_terminals_get_several_tables_or_one_on_its_side(make_results: Make) -> None:
    wide = printed(make_results(many(3)).table(), 200)
    narrow = printed(make_results(many(2)).table(), 80)
    several = printed(make_results(many(8)).table(), 80)
    assert wide.splitlines()[0].split()[0] == "up_capitals"
    assert narrow.splitlines()[0].split() == ["set", "base", "model-1"]
    assert sum(line.startswith("base") for line in several.splitlines()) >= 3


def test_differences_of_every_two_models(make_results: Make) -> None:
    results = make_results(many(4))
    text = printed(results.differences_table(), 120)
    for pair in ("model-1 - model-2", "model-1 - model-3", "model-2 - model-3"):
        assert pair in text
    assert "base -" not in text
    assert with_interval(results.difference("model-1", "model-2").numbers["O"], mark=True) in text
    assert printed(make_results(many(2)).differences_table(), 80) == ""


def test_markup_in_names_is_text(make_results: Make) -> None:
    scores = many(2)
    scores["[bold]x[/]"] = scores.pop("model-1")
    assert "[bold]x[/]" in printed(make_results(scores, warnings=["[red]mind[/]"]).table(), 200)
    assert "[red]mind[/]" in printed(make_results(scores, warnings=["[red]mind[/]"]).table(), 200)


def test_missing_sides_have_no_columns(make_results: Make) -> None:
    only_up = {name: {t: s for t, s in tasks.items() if t.startswith("up")} for name, tasks in many(3).items()}
    text = printed(make_results(only_up).table(), 200)
    heading = text.splitlines()[1].split()
    assert "F" in text.splitlines()[1]
    assert not {"E", "O", "H"} & set(heading)
    assert "E = " not in text


def test_intervals_as_text() -> None:
    assert with_interval(Estimate(1.26, -0.04, 2.0)) == "+1.3 [+0.0, +2.0]"
    assert with_interval(Estimate(-1.0, -2.0, -0.5), mark=True) == "-1.0 [-2.0, -0.5]*"
    assert with_interval(Estimate(50.0, 40.0, 60.0), signed=False) == "50.0 [40.0, 60.0]"
    assert with_interval(None) == "–"
