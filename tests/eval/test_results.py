from __future__ import annotations

import errno
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval import merge_results
from ktmerge.eval.results import PathPoint, Results
from ktmerge.eval.scores import TaskScore

Make = Callable[..., Results]
SCORES = {
    "base": {"up_a": [1.0, 0.0, 1.0], "down_b": [0.0, 0.0, 1.0]},
    "tuned": {"up_a": [0.0, 0.0, 1.0], "down_b": [1.0, 1.0, 1.0]},
}


def test_round_trip(make_results: Make, tmp_path: Path) -> None:
    results = make_results(SCORES, reference="tuned", warnings=["mind <this>"], seed=3)
    results.scores["tuned"]["down_b"].details["outputs"] = ["a\nb", "é", ""]
    results.save(tmp_path / "scores.json")
    loaded = Results.load(tmp_path / "scores.json")
    assert loaded.to_json() == results.to_json()
    assert loaded.models == results.models
    assert loaded.tasks == results.tasks
    np.testing.assert_array_equal(loaded.scores["tuned"]["up_a"].scores, SCORES["tuned"]["up_a"])
    assert loaded.source == str(tmp_path / "scores.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


def test_json_has_summary_and_formulas_for_scripts(make_results: Make) -> None:
    document = json.loads(json.dumps(make_results({**SCORES, "half": SCORES["base"]}).to_json()))
    assert list(document["models"]) == ["base", "tuned", "half"]
    assert document["models"]["tuned"]["summary"]["E"]["value"] == pytest.approx(200 / 3)
    assert document["models"]["tuned"]["tasks"]["up_a"]["score"] == pytest.approx(100 / 3)
    assert document["formulas"]["O"] == "O = E + F"
    assert [(one["a"], one["b"]) for one in document["differences"]] == [("tuned", "half")]


def test_perplexity_of_text(make_results: Make) -> None:
    score = TaskScore(np.array([0.5]), {"nll": [8.0, 4.0], "bytes": [6, 2], "tokens": [3, 1], "correct": [1, 1]})
    assert score.extras()["perplexity_per_byte"] == pytest.approx(np.exp(12 / 8))
    assert score.extras()["bits_per_byte"] == pytest.approx(12 / 8 / np.log(2))
    assert TaskScore(np.array([0.5]), {}).extras() == {}
    lost = TaskScore(np.array([0.5]), {"nll": [8000.0], "bytes": [4], "tokens": [2], "words": [1]}).extras()
    assert list(lost) == ["bits_per_byte"], "a perplexity beyond all numbers is left out"


def damage(document: dict[str, Any], way: str) -> Any:
    tasks = document["models"]["tuned"]["tasks"]
    if way == "not a dict":
        return [1, 2]
    if way == "no mark":
        del document["ktmerge_eval"]
    elif way == "newer":
        document["ktmerge_eval"] = 99
    elif way == "no models":
        del document["models"]
    elif way == "no base":
        del document["models"]["base"]
    elif way == "short":
        tasks["up_a"]["scores"].pop()
    elif way == "out of range":
        tasks["up_a"]["scores"][0] = 7
    elif way == "text for number":
        tasks["up_a"]["scores"][0] = "x"
    elif way == "other tasks":
        tasks["up_z"] = tasks.pop("up_a")
    elif way == "unknown key":
        document["suite"]["tasks"][0]["what"] = 1
    elif way == "no resamples":
        document["settings"]["bootstrap"] = 0
    elif way == "no such reference":
        document["settings"]["reference"] = "nobody"
    elif way == "other side":
        document["suite"]["tasks"][0]["side"] = "left"
    elif way == "seconds":
        document["models"]["tuned"]["seconds"] = "long"
    elif way == "few outputs":
        tasks["up_a"]["details"]["outputs"] = ["x"]
    elif way == "figure":
        tasks["up_a"]["figures"]["unread"] = "many"
    elif way == "null":
        document["models"]["tuned"] = None
    return document


@pytest.mark.parametrize(
    "way",
    [
        "not a dict", "no mark", "newer", "no models", "no base", "short", "out of range", "text for number",
        "other tasks", "unknown key", "null", "no resamples", "no such reference", "other side", "seconds",
        "few outputs", "figure",
    ],
)  # fmt: skip
def test_garbage_is_refused_with_its_name(make_results: Make, tmp_path: Path, way: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(damage(make_results(SCORES).to_json(), way)))
    with pytest.raises(UsageError, match=r"scores\.json"):
        Results.load(path)


def chosen(make_results: Make) -> dict[str, Any]:
    """The document of two models on a set of three items with two choices each."""
    results = make_results({"base": {"up_a": [1, 0, 1]}, "tuned": {"up_a": [0, 1, 1]}})
    results.tasks[0] = replace(results.tasks[0], choices=[["a", "b"]] * 3, references=[0, 1, [0, 1]])
    for name, predicted in (("base", [0, 0, 0]), ("tuned", [1, 1, 1])):
        results.scores[name]["up_a"].details.update(predicted=predicted, logprobs=[[-1.0, -2.0]] * 3)
    document: dict[str, Any] = json.loads(json.dumps(results.to_json()))
    return document


OWN, SET = ("models", "tuned", "tasks", "up_a"), ("suite", "tasks", 0)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((*OWN, "details", "predicted", 1), 2, "'tuned': item 2 of 'up_a' has 2 as 'predicted', which is none of its"),
        ((*OWN, "details", "predicted", 1), None, "'tuned': item 2 of 'up_a' has None as 'predicted'"),
        ((*OWN, "details", "predicted", 0), 0, "item 1 of 'up_a' has the score 0, but 0 predicted and 0 as its"),
        ((*OWN, "details", "logprobs", 2), [-1.0], r"item 3 of 'up_a' has \[-1.0\] as 'logprobs'"),
        ((*OWN, "details", "logprobs", 2), [-1.0, float("-inf")], "item 3 of 'up_a' has"),
        ((*OWN, "scores", 2), float("nan"), "'tuned': item 3 of 'up_a' has the score nan, which must be from 0 to 1"),
        ((*OWN, "scores", 2), float("inf"), "item 3 of 'up_a' has the score inf"),
        ((*OWN, "scores", 2), 10**400, "OverflowError"),
        ((*OWN, "scores"), [1.0], r"'tuned': 'up_a' has 3 items and scores of shape \[1\]"),
        ((*OWN, "score"), 50.0, "'tuned': the items of 'up_a' come to 66.6667, the score beside them is 50.0"),
        ((*OWN, "figures"), {"unread": float("inf")}, "'tuned': 'up_a' has the figure unread inf"),
        ((*OWN, "details", "nll"), ["x"] * 3, "item 1 of 'up_a' has 'x' as 'nll'"),
        ((*SET, "references", 0), 2, "item 1 of 'up_a' has 2 as its reference, which is none of its choices"),
        ((*SET, "references", 2), [0, -1], r"item 3 of 'up_a' has \[0, -1\] as its reference"),
        ((*SET, "rows", 2), 0, "row 0 is two items of 'up_a'"),
        ((*SET, "prompts"), ["x"], "'up_a' has 3 items and 1 prompts"),
        (("suite", "tasks"), lambda tasks: tasks * 2, "two tasks are called 'up_a'"),
        (("models", "tuned", "seconds"), float("nan"), "it holds what no JSON has"),
    ],
)
def test_contradictions_name_file_and_item(
    make_results: Make, tmp_path: Path, place: tuple[Any, ...], value: Any, said: str
) -> None:
    document = chosen(make_results)
    Results.from_json(document, "whole")
    at: Any = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value(at[place[-1]]) if callable(value) else value
    (tmp_path / "scores.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=rf"scores\.json: a damaged score file: .*{said}.*; score again with"):
        Results.load(tmp_path / "scores.json")


def test_tokens_that_do_not_come_to_the_score_are_named(make_results: Make) -> None:
    results = make_results({"base": {"up_a": [0.5, 0.25]}})
    results.tasks[0] = replace(results.tasks[0], kind="text", metric="next_token_accuracy")
    results.scores["base"]["up_a"].details.update(correct=[2, 1], tokens=[4, 4])
    document = results.to_json()
    assert Results.from_json(document, "x").to_json() == document
    document["models"]["base"]["tasks"]["up_a"]["details"]["tokens"] = [4, 5]
    with pytest.raises(UsageError, match=r"item 2 of 'up_a' has the score 0\.25, but 1 of 5 tokens correct"):
        Results.from_json(document, "x")


def test_a_key_that_stands_twice_is_refused(make_results: Make, tmp_path: Path) -> None:
    """The last of two models with one name would count, in silence."""
    text = json.dumps(chosen(make_results))
    (tmp_path / "twice.json").write_text(text.replace('"tuned": {', '"tuned": {}, "tuned": {', 1))
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    for name, said in (("twice", "the key 'tuned' stands twice"), ("cut", r"or cut off: .* \(char \d+\)")):
        with pytest.raises(UsageError, match=rf"{name}\.json: not a score file of 'ktmerge eval', .*{said}"):
            Results.load(tmp_path / f"{name}.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"ktmerge_eval": 1}'])
def test_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.json"):
        Results.load(tmp_path / "x.json")
    with pytest.raises(UsageError, match="No such file"):
        Results.load(tmp_path / "missing.json")


def test_saving_where_it_cannot_be_is_a_sentence(make_results: Make, tmp_path: Path) -> None:
    with pytest.raises(KtmergeError, match="nowhere"):
        make_results(SCORES).save(tmp_path / "nowhere/scores.json")
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_one_is_there_whole_and_the_other_is_told(make_results: Make, tmp_path: Path) -> None:
    """Each saw that the file is not there before it began."""
    path = tmp_path / "scores.json"
    runs = [make_results(SCORES, seed=seed) for seed in range(6)]

    def save(results: Results) -> str:
        try:
            results.save(path, overwrite=False)
        except UsageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(runs)) as pool:
        told = list(pool.map(save, runs))
    assert told.count("") == 1
    assert {one for one in told if one} == {
        f"{path} was written by another run meanwhile; choose another name, or add --overwrite."
    }
    assert Results.load(path).seed == told.index("")
    assert list(tmp_path.iterdir()) == [path]
    runs[0].save(path)
    assert Results.load(path).seed == 0


def test_where_no_links_are_known_a_file_is_written_still(
    make_results: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    make_results(SCORES).save(tmp_path / "scores.json", overwrite=False)
    assert Results.load(tmp_path / "scores.json").base == "base"
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


def test_a_path_through_models(make_results: Make) -> None:
    results = make_results({**SCORES, "half": SCORES["base"]})
    way = results.path({1.0: "tuned", 0.0: "base", 0.5: "half"})
    assert way[0] == PathPoint(0.0, 0.0, 0.0)
    assert [point.coefficient for point in way] == [0.0, 0.5, 1.0]
    end = [way[2].E, way[2].F]
    assert end == pytest.approx([200 / 3, -100 / 3])
    with pytest.raises(UsageError, match="Did you mean 'half'"):
        results.path({0.5: "hlf"})


def test_merging_joins_models_of_the_same_base_and_sets(make_results: Make) -> None:
    first = make_results(SCORES, source="/x/one.json")
    other = make_results({"base": SCORES["base"], "half": SCORES["base"], "tuned": SCORES["tuned"]}, source="two.json")
    merged = merge_results([first, other])
    assert list(merged.models) == ["base", "tuned", "half"]
    assert merge_results([first]).to_json() == first.to_json()


def test_merging_tells_models_of_one_name_apart(make_results: Make) -> None:
    first = make_results(SCORES, source="/x/one.json")
    other = make_results({"base": SCORES["base"], "tuned": SCORES["base"]}, source="/x/two.json")
    other.models["tuned"] = first.models["base"]
    assert list(merge_results([first, other]).models) == ["base", "tuned", "two:tuned"]


def test_merging_keeps_scores_that_differ_though_the_weights_are_the_same(make_results: Make) -> None:
    """Another configuration, or a file changed by hand."""
    first = make_results(SCORES, source="/x/one.json")
    other = make_results({**SCORES, "tuned": SCORES["base"]}, source="/x/two.json")
    assert list(merge_results([first, other]).models) == ["base", "tuned", "two:tuned"]


def test_merging_refuses_what_does_not_compare(make_results: Make) -> None:
    first = make_results(SCORES, source="one.json")
    tasks = [replace(first.tasks[0], digest="changed"), first.tasks[1]]
    renamed = [replace(first.tasks[0], name="up_z"), first.tasks[1]]
    own = {name: {"up_z": found["up_a"], "down_b": found["down_b"]} for name, found in SCORES.items()}
    cases = {
        "only one has 'up_a'": make_results(own, tasks=renamed),
        r"one\.json and two\.json were measured on different sets \(data or settings of 'up_a' differ\)": make_results(
            SCORES, suite_digest="x", tasks=tasks
        ),
        r"different sets \(only one has 'up_a'\)": make_results(
            {name: {"down_b": found["down_b"]} for name, found in SCORES.items()}, suite_digest="x"
        ),
        "different base models": make_results(
            SCORES, models={n: replace(m, digest=f"other {n}") for n, m in first.models.items()}
        ),
        r"on 'up_a' the base scores 66\.67 in one and 33\.33 in the other": make_results(
            {**SCORES, "base": {**SCORES["base"], "up_a": [1.0, 0.0, 0.0]}}
        ),
    }
    for said, other in cases.items():
        with pytest.raises(UsageError, match=said):
            merge_results([first, replace(other, source="two.json")])
    with pytest.raises(UsageError, match="at least one"):
        merge_results([])


def test_models_are_named_alike_however_they_are_given(tmp_path: Path) -> None:
    from ktmerge.api.inputs import named_models, refuse_existing

    assert named_models({"a": tmp_path}) == named_models([f"a={tmp_path}"]) == {"a": str(tmp_path)}
    with pytest.raises(UsageError, match="only the untuned model is called 'base'"):
        named_models({"base": tmp_path})
    with pytest.raises(UsageError, match="is a folder; name a file"):
        refuse_existing(tmp_path, overwrite=True)
