"""Labels, letters, extracted answers, worked examples and parts, on the tiny model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.errors import UsageError
from ktmerge.eval import read_sets, score_model
from ktmerge.eval.items import ChoiceItem, GenerateItem, LetterItem, whole_prompt
from ktmerge.eval.marking import extracted, mark
from ktmerge.eval.rows import load
from ktmerge.recipes.suites import Suite

ROWS = [{"q": f"The dog {i} is", "options": ["good", "bad", "three"], "gold": i % 3} for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def suite(folder: Path, *tasks: dict[str, Any], **more: Any) -> Suite:
    named = [{"name": f"t{i}", "data": "x.jsonl", "prompt": "{{ q }}", **task} for i, task in enumerate(tasks)]
    return Suite(upstream=named, folder=folder, **more)


LABELS = {"kind": "classify", "labels": ["good", "bad", "three"], "answer": "{{ gold }}"}
CHOICE = {"kind": "choice", "choices": "options", "answer": "{{ gold }}"}
LETTER = {"kind": "letter", "prompt": "{{ q }}\n{{ lettered }}\nAnswer:", "choices": "options", "answer": "{{ gold }}"}
SAY = {"kind": "generate", "answer": "{{ options[gold] }}"}


def test_labels_score_as_choices_do(llama: Any, tokenizer: Any, folder: Path) -> None:
    found = score_model(llama, tokenizer, suite(folder, LABELS, CHOICE))
    np.testing.assert_array_equal(found["t0"].scores, found["t1"].scores)
    assert found["t0"].details["logprobs"] == found["t1"].details["logprobs"]
    predicted = found["t0"].details["predicted"]
    assert [float(p == i % 3) for i, p in enumerate(predicted)] == found["t0"].scores.tolist()
    recalls = [np.mean([predicted[i] == label for i in range(12) if i % 3 == label]) for label in range(3)]
    assert found["t0"].extras()["balanced_accuracy"] == pytest.approx(100 * np.mean(recalls))


def test_any_of_several_right_choices_counts(llama: Any, tokenizer: Any, folder: Path) -> None:
    several = CHOICE | {"answer": "{{ [gold, (gold + 1) % 3] }}"}
    found = score_model(llama, tokenizer, suite(folder, CHOICE, several))
    assert found["t1"].details == found["t0"].details
    expected = [float((p - i) % 3 < 2) for i, p in enumerate(found["t0"].details["predicted"])]
    assert 0 < sum(expected) < 12
    assert found["t1"].scores.tolist() == expected


def test_letters_are_asked_and_read(llama: Any, tokenizer: Any, folder: Path) -> None:
    (one,) = read_sets(suite(folder, LETTER))
    item = one.items[1]
    assert isinstance(item, LetterItem)
    assert item.prompt == "The dog 1 is\nA. good\nB. bad\nC. three\nAnswer:"
    score = mark(one, ["B" if i % 2 else "no idea" for i in range(12)])
    assert score.scores.tolist() == [float(i % 2 and i % 3 == 1) for i in range(12)]
    assert score.extras() == {"unread": 50.0}
    assert score.details["predicted"][:2] == [None, 1]
    found = score_model(llama, tokenizer, [one])["t0"]
    assert len(found.details["outputs"]) == 12
    assert found.scores.tolist() == mark(one, found.details["outputs"]).scores.tolist(), "answers can be marked again"


def test_the_last_match_is_the_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extracted("#### 3, no #### 12", r"#### (\d+)") == "12"
    assert extracted("3 and 12", r"\d+") == "12"
    assert extracted("none", r"\d+") is None
    monkeypatch.setattr("ktmerge.eval.marking._SECONDS", 0.01)
    with pytest.raises(UsageError, match="repeats"):
        extracted(",".join(map(str, range(30))), "(.*?,){15}P")
    (one,) = read_sets(suite(folder, {**SAY, "answer": "{{ gold }}", "extract": r"\d+"}))
    score = mark(one, ["it is 0"] * 6 + ["nothing"] * 6)
    assert score.scores.sum() == 2
    assert score.figures["unread"] == 50
    assert score.details["answers"][0] == "0"


def test_several_references(folder: Path) -> None:
    (one,) = read_sets(suite(folder, {**SAY, "answer": "{{ options }}"}))
    assert isinstance(one.items[0], GenerateItem)
    assert one.items[0].answers == ("good", "bad", "three")
    assert mark(one, ["bad"] * 12).mean == 100
    for metric, few in (("vqa", 3), ("vqa_simple", 2)):  # even the right answer would score less than 1, alone 0
        asked = {**SAY, "answer": f"{{{{ ['good'] * {few} }}}}", "metric": metric}
        with pytest.raises(UsageError, match=rf"x\.jsonl:1 has too few answers \({few}\): '{metric}' counts people"):
            read_sets(suite(folder, asked))
        (one,) = read_sets(suite(folder, {**asked, "answer": f"{{{{ ['good'] * {few + 1} }}}}"}))
        assert mark(one, ["good"] * 12).mean == 100
    with pytest.raises(UsageError, match="gives an empty list"):
        read_sets(suite(folder, {**SAY, "answer": "{{ [] }}"}))


@pytest.mark.parametrize("task", [CHOICE, LETTER, SAY])
def test_worked_examples_never_show_the_row_itself(folder: Path, task: dict[str, Any]) -> None:
    (one,) = read_sets(suite(folder, {**task, "shots": 3}))
    for i, item in enumerate(one.items):
        assert not isinstance(item, GenerateItem | ChoiceItem | LetterItem) or len(item.shots) == 3
        shown = re.findall(r"The dog (\d+) is", whole_prompt(item))
        assert len(set(shown)) == 4
        assert shown[-1] == str(i)
    again, other = (read_sets(suite(folder, {**task, "shots": 3, "seed": seed}))[0] for seed in (0, 1))
    assert again.items == one.items
    assert other.items != one.items
    assert other.digest != one.digest


def test_worked_examples_read_like_the_question(folder: Path, tokenizer: Any) -> None:
    (folder / "shots.csv").write_text('q,options,gold\n"Snow is","good",0\n')
    settings = {"kind": "choice", "choices": ["good", "bad"], "answer": "{{ gold | int }}", "shots": 1}
    (one,) = read_sets(suite(folder, {**settings, "shots_from": "shots.csv", "limit": 1, "data": "x.jsonl"}))
    assert whole_prompt(one.items[0]).startswith("Snow is good\n\nThe dog ")
    from ktmerge.eval.encode import Encoder

    asked = Encoder(tokenizer, None).asked(one.items[0], chat=True)
    turns = [{"role": "user", "content": "Snow is"}, {"role": "assistant", "content": "good"}]
    turns.append({"role": "user", "content": one.items[0].prompt})
    assert asked == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    with pytest.raises(UsageError, match="2 wanted, there are 1"):
        read_sets(suite(folder, {**settings, "shots": 2, "shots_from": "shots.csv"}))


def test_a_row_is_in_one_part_only(folder: Path) -> None:
    split = suite(folder, CHOICE, selection=0.4)
    rows = {part: [item.row for item in read_sets(split, part)[0].items] for part in ("selection", "report", "all")}
    assert sorted(rows["selection"] + rows["report"]) == rows["all"] == list(range(12))
    assert rows["selection"]
    assert [item.row for item in read_sets(split)[0].items] == rows["report"], "the report's rows unless told otherwise"
    digests = {part: read_sets(split, part)[0].digest for part in ("selection", "report")}
    assert digests["selection"] != digests["report"]
    limited = read_sets(suite(folder, {**CHOICE, "limit": 2}, selection=0.4), "selection")[0]
    assert {item.row for item in limited.items} <= set(rows["selection"])
    with pytest.raises(UsageError, match="keeps no rows for selection"):
        read_sets(suite(folder, CHOICE), "selection")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_new_kinds_do_not_depend_on_the_batch_or_the_order(
    llama: Any, tokenizer: Any, folder: Path, batch_size: int
) -> None:
    tasks = [{**LABELS, "shots": 2}, {**LETTER, "chat": True, "shots": 1}, {**SAY, "metric": "f1"}]
    sets = read_sets(suite(folder, *tasks))
    whole = score_model(llama, tokenizer, sets, batch_size=16)
    turned = [replace(one, items=one.items[::-1]) for one in sets]
    for found in (
        score_model(llama, tokenizer, sets, batch_size=batch_size),
        {
            name: replace(score, scores=score.scores[::-1], details={k: v[::-1] for k, v in score.details.items()})
            for name, score in score_model(llama, tokenizer, turned).items()
        },
    ):
        for name, score in whole.items():
            np.testing.assert_array_equal(found[name].scores, score.scores)
            for column in score.details.keys() & {"outputs", "predicted"}:
                assert found[name].details[column] == score.details[column]


def test_folders_hold_splits(tmp_path: Path) -> None:
    (tmp_path / "d" / "main").mkdir(parents=True)
    (tmp_path / "d" / "main" / "test-00000-of-00002.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "d" / "main" / "test-00001-of-00002.jsonl").write_text('{"a": 2}\n')
    (tmp_path / "d" / "main" / "train.csv").write_text("a\n3\n")
    found = load("d", tmp_path, "main", "test")
    assert [(row.number, row.values["a"]) for row in found.rows] == [(0, 1), (1, 2)]
    assert load("d", tmp_path, "main", "train").rows[0].values == {"a": "3"}
    for subset, split, said in [
        ("mian", "test", "Did you mean 'main'?"), ("main", "tset", "Did you mean 'test'?"), ("main", None, "'split'"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(said)):
            load("d", tmp_path, subset, split)
    with pytest.raises(UsageError, match="neither subset nor split"):
        load("d/main/train.csv", tmp_path, None, "train")


def test_a_dataset_by_name_is_read_by_the_library(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    found = load(f"hf:{tmp_path / 'set'}", tmp_path, None, "test")
    assert [row.values for row in found.rows] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UsageError, match="the dataset cannot be loaded"):
        load(f"hf:{tmp_path / 'none'}", tmp_path, None, "test")


def test_words_of_a_text_are_those_that_begin_in_it(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    text = "The  quick brown fox\njumps over élan the lazy dog. " * 3
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}))
    task = {"name": "t", "kind": "text", "data": "t.jsonl", "chunk_tokens": 512}
    found = score_model(llama, tokenizer, Suite(upstream=[task], folder=tmp_path))["t"]
    assert found.details["words"] == [len(text.split()) - 1], "the first token, given, is where the first word begins"
    nll = sum(found.details["nll"])
    assert found.extras()["perplexity_per_word"] == pytest.approx(np.exp(nll / (len(text.split()) - 1)))
    assert found.extras()["perplexity_per_token"] == pytest.approx(np.exp(nll / found.details["tokens"][0]))
