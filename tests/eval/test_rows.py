"""A task's rows: its file's, drawn by a seed; what is wrong with them is said with the task's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval.rows import draw, read_rows
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import TextTask


def task(data: str, **more: Any) -> TextTask:
    return TextTask(name="t", kind="text", data=data, **more)


def test_a_limit_draws_rows_that_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(50)))
    whole, drawn = read_rows(task("x.jsonl"), tmp_path), read_rows(task("x.jsonl", limit=7, seed=3), tmp_path)
    assert [row.values["n"] for row in whole.rows] == list(range(50))
    assert len(drawn.rows) == 7
    assert all(row.values["n"] == row.number for row in drawn.rows)
    assert drawn.digest == whole.digest, "the digest is the whole file's"


def test_problems_name_task_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": \n' + "3\n" * 9)
    with pytest.raises(UsageError) as caught:
        read_rows(task("x.jsonl"), tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"task 't': {tmp_path / 'x.jsonl'}:2: not valid JSON")
    assert lines[-1] == "... and 5 more problems in the data."
    (tmp_path / "capitals.jsonl").write_text("{}")
    with pytest.raises(UsageError, match=r"task 't': .*capitols\.jsonl: no such file\. Did you mean 'capitals\.jsonl'"):
        read_rows(task("capitols.jsonl"), tmp_path)


def test_draws_are_seeded_nested_and_in_file_order() -> None:
    rows = [Row(i, str(i), {}) for i in range(200)]
    numbers = {limit: [row.number for row in draw(rows, limit, 3)] for limit in (20, 50)}
    assert len(numbers[20]) == 20
    assert numbers[20] == sorted(numbers[20])
    assert set(numbers[20]) < set(numbers[50])
    assert numbers[20] == [row.number for row in draw(rows, 20, 3)]
    assert numbers[20] != [row.number for row in draw(rows, 20, 4)]
    assert draw(rows, None, 0) == draw(rows, 200, 0) == draw(rows, 999, 0) == rows
    assert numbers[20] != list(range(20))


def test_datasets_saved_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i}", "n": i} for i in range(3)]
    alone = datasets.Dataset.from_list(rows)
    alone.save_to_disk(str(tmp_path / "alone"))
    datasets.DatasetDict({"test": alone, "train": alone.select([2])}).save_to_disk(str(tmp_path / "parts"))
    for data, more in (
        ("alone", {}), ("alone", {"split": "test"}), (f"hf:{tmp_path / 'alone'}", {}), ("parts", {"split": "test"}),
        (f"hf:{tmp_path / 'parts'}", {"split": "test"}),
    ):  # fmt: skip
        found = read_rows(task(data, **more), tmp_path)
        assert [row.values for row in found.rows] == rows
        assert found.rows[1].where.endswith("row 2")
    assert [row.values["n"] for row in read_rows(task("parts", split="train"), tmp_path).rows] == [2]
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    for data, more, said in (
        ("parts", {}, r"parts: say with 'split' .* Valid: test, train"),
        ("parts", {"split": "tset"}, r"no split 'tset' in it\. Did you mean 'test'"),
        ("parts", {"split": "test", "subset": "x"}, "has no subsets"),
        ("empty", {}, "empty: there are no rows in it"),
        ("broken", {}, "broken: the dataset cannot be loaded"),
        ("hf:", {"split": "test"}, "names no dataset; write hf:owner/name"),
    ):
        with pytest.raises(UsageError, match=f"task 't': .*{said}"):
            read_rows(task(data, **more), tmp_path)


def test_lines_that_are_lists_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("[1, 2]\n[3]\n")
    with pytest.raises(UsageError, match=r"x\.jsonl:1: a row is an object with named values, not a list"):
        read_rows(task("x.jsonl"), tmp_path)
