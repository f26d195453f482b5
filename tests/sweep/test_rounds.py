"""Items in rounds: none lost, none twice."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval import read_sets
from ktmerge.eval.harness import HarnessSet
from ktmerge.eval.loading import load_tokenizer
from ktmerge.eval.sets import TaskSet
from ktmerge.recipes.harness import HarnessTask
from ktmerge.recipes.suites import Suite
from ktmerge.sweep.divergence import Teachers
from ktmerge.sweep.rounds import cut, scored_sets

ASKED = {"kind": "choice", "data": "rows.jsonl", "prompt": "{{ q }}", "choices": ["yes", "no"], "answer": "yes"}


@pytest.fixture
def sets(tmp_path: Path) -> list[TaskSet]:
    """A set of 20 rows, and one that lm_eval asks."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"q": "Is {n} good?"}}\n' for n in range(20)))
    made = HarnessSet([], None, {"theirs": [0, 1]}, ("acc", "none"), [], ["a", "b"], [0, 1], [], "d", "d", "s")
    theirs = TaskSet(HarnessTask(name="theirs", lm_eval="theirs"), "downstream", [], "d", "d", made)
    return [*read_sets(Suite(upstream=[{"name": "ours", **ASKED}], folder=tmp_path)), theirs]


def test_every_item_is_in_one_round_and_lm_evals_in_the_first(sets: list[TaskSet], tiny_llama: Path) -> None:
    rounds = cut(sets, [0.1, 0.5, 1.0], load_tokenizer(tiny_llama), 512)
    assert [[one.task.name for one in each.sets] for each in rounds] == [["ours", "theirs"], ["ours"], ["ours"]]
    assert len(rounds[0].encoded["theirs"].rows) == 2
    rows = [item.row for each in rounds for item in each.sets[0].items]
    assert sorted(rows) == list(range(len(rows)))
    assert len(rows) == 20
    with pytest.raises(UsageError, match="no downstream set has texts"):
        Teachers(None, {}, rounds[0], load_tokenizer(tiny_llama))


def test_chunks_of_a_text_are_in_one_round_and_one_group(tmp_path: Path, tiny_llama: Path) -> None:
    texts = ["the fox saw the dog and went to heaven " * (1 + n % 5) if n % 3 == 0 else "" for n in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {"name": "texts", "kind": "text", "data": "texts.jsonl", "chunk_tokens": 8}
    found = read_sets(Suite(upstream=[task], folder=tmp_path))
    rounds = cut(found, [0.125, 0.5, 1.0], load_tokenizer(tiny_llama), 512)  # not of nothing but empty texts
    rows = [set(one.encoded["texts"].rows) for one in rounds if one.sets]
    assert not any(a & b for a, b in combinations(rows, 2))
    (groups,) = (one.groups for one in scored_sets(rounds).values())
    assert set(groups) == set.union(*rows) == set(range(0, 24, 3))
    assert len(groups) == sum(len(one.encoded["texts"].requests) for one in rounds) > 24
