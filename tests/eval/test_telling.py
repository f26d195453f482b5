"""Which items a report shows, in which order; and results as tables for other tools."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ktmerge import api
from ktmerge import eval as evaluation
from ktmerge.cli import _exit_code
from ktmerge.errors import UsageError
from ktmerge.eval.listing import comma_separated, markdown
from ktmerge.eval.page import render
from ktmerge.eval.results import Results
from ktmerge.eval.scores import ModelInfo, TaskScore
from ktmerge.eval.telling import MOST, telling

Make = Callable[..., Results]


def test_the_worst_losses_stand_first(make_results: Make) -> None:
    scores = {
        "base": {"up": [1, 1, 1, 0, 0, 1], "down": [0]},
        "a": {"up": [1, 0, 0, 1, 0, 0], "down": [1]},
        "b": {"up": [1, 0, 1, 1, 0, 0.5], "down": [0]},
    }
    results = make_results(scores)
    items = telling(results, results.tasks[0])
    assert [item.number for item in items] == [2, 6, 3, 4]
    assert [item.change for item in items] == ["lost", "lost", "lost", "gained"]
    assert [item.change for item in telling(results, results.tasks[1])] == ["gained"]
    assert items[1].answers["b"].score == 0.5


def test_what_was_said_is_shown_by_kind(make_results: Make) -> None:
    results = make_results({"base": {"up": [1, 1]}, "a": {"up": [0, 1]}})
    results.tasks[0].references[:] = [2, 0]
    for name, logprobs in (("base", [[-9, -8, -1], [0, -1, -2]]), ("a", [[-1, -8, -9], [0, -1, -2]])):
        found = results.scores[name]["up"]
        results.scores[name]["up"] = TaskScore(found.scores, {"logprobs": logprobs})
    (item,) = telling(results, results.tasks[0])
    assert item.reference == "choice 3"
    assert {name: answer.text for name, answer in item.answers.items()} == {"base": "choice 3", "a": "choice 1"}
    assert item.answers["base"].right
    assert not item.answers["a"].right


@pytest.mark.parametrize(
    ("kind", "metric", "said"),
    [
        ("choice", "acc", {"reference": "Minsk", "base": "Minsk", "a": "no such place as this"}),
        ("lm_eval", "acc_norm,none", {"reference": "Minsk", "base": "Minsk", "a": "no such place as this"}),
        ("lm_eval", "acc,none", {"reference": "Minsk", "base": "Minsk", "a": "Minsk"}),
    ],
)
def test_choices_are_shown_by_what_they_say(make_results: Make, kind: str, metric: str, said: dict[str, str]) -> None:
    results = make_results({"base": {"up": [1, 1]}, "a": {"up": [0, 1]}})
    choices = [["Minsk", "no such place as this"]] * 2
    results.tasks[0] = replace(results.tasks[0], kind=kind, metric=metric, choices=choices)
    for name, logprobs in (("base", [[-1.0, -30.0]] * 2), ("a", [[-5.0, -6.0]] * 2)):
        details = {"logprobs": logprobs} | ({"predicted": [int(name == "a"), 0]} if kind == "choice" else {})
        results.scores[name]["up"] = TaskScore(results.scores[name]["up"].scores, details)
    (item,) = telling(results, results.tasks[0])
    assert {"reference": item.reference} | {name: one.text for name, one in item.answers.items()} == said


def test_a_letter_is_expected_with_its_choice(make_results: Make) -> None:
    results = make_results({"base": {"up": [1]}, "a": {"up": [0]}})
    results.tasks[0] = replace(results.tasks[0], kind="letter", choices=[["Lima", "Minsk"]], references=[1])
    for name, output in (("base", "(B)"), ("a", "A.")):
        found = results.scores[name]["up"]
        results.scores[name]["up"] = TaskScore(found.scores, {"outputs": [output], "predicted": [0]})
    (item,) = telling(results, results.tasks[0])
    assert item.reference == "B. Minsk"
    assert [one.text for one in item.answers.values()] == ["(B)", "A."]


def test_many_items_keep_both_ends(make_results: Make) -> None:
    base = [1.0] * 100 + [0.0] * 100
    results = make_results({"base": {"up": base}, "a": {"up": [1 - one for one in base]}})
    items = telling(results, results.tasks[0])
    assert len(items) == MOST
    assert {item.change for item in items} == {"lost", "gained"}
    assert items[0].number == 1
    assert items[-1].number == 200


def test_a_table_for_a_model_card(make_results: Make) -> None:
    results = make_results({"base": {"up": [1, 1], "down|x": [0, 0]}, "a<b>": {"up": [1, 0], "down|x": [1, 1]}})
    text = markdown(results)
    rows = [line for line in text.splitlines() if line.startswith("| a&lt;b>")]
    assert rows[0].startswith("| a&lt;b> | +100.0 [")
    assert "| 50.0 ± " in rows[1]
    assert "down\\|x (downstream)" in text


def test_the_best_stands_first_with_one_side_too(make_results: Make) -> None:
    results = make_results({"base": {"down": [0, 0]}, "good": {"down": [1, 0]}, "best": {"down": [1, 1]}})
    names = [line.split(" |")[0] for line in markdown(results).splitlines() if line.startswith("| ")]
    assert names[2:5] == ["| base", "| best", "| good"]


def test_every_score_in_a_file(make_results: Make) -> None:
    results = make_results({"base": {"up": [1, 1], "down": [0, 0]}, "a, b": {"up": [1, 0], "down": [1, 1]}})
    rows = list(csv.DictReader(io.StringIO(comma_separated(results))))
    found = {(row["model"], row["quantity"]): float(row["value"]) for row in rows}
    assert found["a, b", "E"] == 100
    assert found["a, b", "F"] == -50
    assert found["a, b", "up"] == 50
    assert len({row["quantity"] for row in rows if row["model"] == "base"} & {"up", "down"}) == 2


def with_folder(results: Results, name: str, folder: Path) -> None:
    one = results.models[name]
    results.models[name] = ModelInfo(str(folder), one.digest, one.tokenizer, one.device, one.dtype, one.seconds)


@pytest.mark.slow
def test_recipe_and_lock_come_from_the_model_s_folder(make_results: Make, tmp_path: Path) -> None:
    results = make_results({"base": {"up": [1, 1], "down": [0, 0]}, "a": {"up": [1, 0], "down": [1, 1]}})
    lock = {
        "ktmerge_lock": 1,
        "recipe": {
            "name": "x",
            "blend": {"method": "ties", "density": 0.2, "lambda": 0.8, "where": [{"keep": "base"}]},
        },
        "inputs": {"base": {"files": {"model.safetensors": {"size": 1, "sha256": "abcdef" * 10}}}},
    }
    (tmp_path / "ktmerge.lock.yaml").write_text(yaml.safe_dump(lock))
    with_folder(results, "a", tmp_path)
    page = render(results)
    assert "ties: density 0.2, lambda 0.8, 1 rule" in page
    assert "<title>a: E +100.0, F -50.0\nties: density 0.2" in page
    assert 'href="#model-1"' in page
    assert 'id="model-1"' in page
    assert "model.safetensors abcdefabcdef" in page
    (tmp_path / "ktmerge.lock.yaml").write_text("- no lock")
    assert "model-1" not in render(results)


@pytest.mark.usefixtures("undrawn")
def test_several_runs_in_one_page(make_results: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"up": [1.0, 1.0], "down": [0.0, 0.0]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_results({"base": base, name: {"up": [1, 0], "down": [1, 1]}}).save(tmp_path / name / "scores.json")
    out = tmp_path / "report.html"
    given = [str(tmp_path / "a"), str(tmp_path / "b" / "scores.json")]
    more = ["--md", str(tmp_path / "card.md"), "--csv", str(tmp_path / "scores.csv")]
    assert _exit_code(["report", *given, "--out", str(out), *more]) == 0
    assert "ktmerge eval a=a b=b --base base" in out.read_text()
    assert "| b |" in (tmp_path / "card.md").read_text()
    assert (tmp_path / "scores.csv").read_text().count("\n") > 10
    assert str(tmp_path) not in out.read_text()
    assert _exit_code(["report", *given, "--out", str(tmp_path / "new.html"), *more]) == 2
    assert "card.md exists" in capsys.readouterr().err
    assert not (tmp_path / "new.html").exists()
    with pytest.raises(UsageError, match=r"has no scores\.json"):
        api.report(tmp_path, tmp_path / "new.html")
    (tmp_path / "blend only" / "blended").mkdir(parents=True)
    (tmp_path / "blend only" / "blended" / "ktmerge.lock.yaml").touch()
    with pytest.raises(UsageError, match=r"blended, but not scored yet.*ktmerge eval '.*/blend only/blended'"):
        api.report(tmp_path / "blend only", tmp_path / "new.html")
    with pytest.raises(UsageError, match="--layers reads weights"):
        api.report(given[0], tmp_path / "new.html", layers=True)
    changed = json.loads((tmp_path / "b" / "scores.json").read_text())
    changed["suite"]["digest"] = "other"
    (tmp_path / "b" / "scores.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="measured on different sets"):
        api.report(given, tmp_path / "new.html")


def test_a_report_neither_eats_its_input_nor_an_output(make_results: Make, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    make_results({"base": {"up": [1, 1], "down": [0, 0]}, "a": {"up": [1, 1], "down": [1, 0]}}).save(scores)
    before = scores.read_bytes()
    once = tmp_path / "once"
    for given in ({"out": scores}, {"out": once, "csv": scores}, {"out": once, "markdown": once}):
        with pytest.raises(UsageError, match="is read or written by this report already"):
            api.report(tmp_path, overwrite=True, **given)
    with pytest.raises(UsageError, match="already"):
        api.report(scores, tmp_path / "page.html", markdown=once, csv=tmp_path / "x" / ".." / "once")
    assert sorted(tmp_path.iterdir()) == [scores]
    assert scores.read_bytes() == before


@pytest.mark.parametrize("other", ["page.html", "card.md", "all.csv"])
def test_a_report_replaces_none_that_another_run_wrote_meanwhile(
    make_results: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    scores = tmp_path / "scores.json"
    make_results({"base": {"up": [1, 1], "down": [0, 0]}, "a": {"up": [1, 1], "down": [1, 0]}}).save(scores)
    targets = {"out": tmp_path / "page.html", "markdown": tmp_path / "card.md", "csv": tmp_path / "all.csv"}
    made = evaluation.render

    def rendering(*arguments: Any, **settings: Any) -> str:
        (tmp_path / other).write_text("another's")
        return made(*arguments, **settings)

    monkeypatch.setattr(evaluation, "render", rendering)
    with pytest.raises(UsageError, match=f"{other} was written by another run meanwhile"):
        api.report(scores, **targets)
    assert (tmp_path / other).read_text() == "another's"
    api.report(scores, **targets, overwrite=True)
    assert (tmp_path / other).read_text() != "another's"


def test_sets_without_items_are_left_out(make_results: Make) -> None:
    results = make_results({"base": {"up": [1, 1]}, "a": {"up": [1, 1]}})
    assert telling(results, results.tasks[0]) == []
    results.scores["a"]["up"] = TaskScore(np.array([0.0, 1.0]), {})
    results.tasks[0].prompts.clear()
    assert telling(results, results.tasks[0]) == []


def test_long_texts_are_cut_where_it_hurts_least(make_results: Callable[..., Results]) -> None:
    from ktmerge.eval.telling import LONGEST

    results = make_results({"base": {"up_a": [1]}, "tuned": {"up_a": [0]}})
    results.tasks[0].prompts[0] = "before " + "x" * LONGEST + " question?"
    for name in results.scores:
        results.scores[name]["up_a"].details["outputs"] = ["Answer " + "y" * 3000]
    (item,) = telling(results, results.tasks[0])
    assert item.prompt.startswith("(17 more characters) … xxx")
    assert item.prompt.endswith("x question?")
    assert item.answers["tuned"].text.startswith("Answer yyy")
    assert item.answers["tuned"].text.endswith(f"… ({3007 - LONGEST:,} more characters)")
