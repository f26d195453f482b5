from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval.rows import Row, draw, read_rows
from ktmerge.recipes.suites import TextTask


def task(data: str, **more: Any) -> TextTask:
    return TextTask(name="t", kind="text", data=data, **more)


def test_reads_jsonl_json_and_parquet_alike(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [{"a": 1, "b": "é"}, {"a": 2, "b": "ö"}]
    lines = "\n".join(json.dumps(value) for value in values)
    (tmp_path / "x.jsonl").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    (tmp_path / "x.json").write_text(json.dumps(values, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "lines.json", "x.parquet"):
        rows = read_rows(task(name), tmp_path)
        assert [row.values for row in rows.rows] == values, name
        assert [row.number for row in rows.rows] == [0, 1]
        assert rows.digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    rows = read_rows(task("x.jsonl"), tmp_path).rows
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl:2: not valid JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "x.jsonl:2: a row is an object with named values, not a list"),
        ("x.json", '[{"a": 1}, 3]', "row 2: a row is an object with named values, not a number"),
        ("x.jsonl", "\n\n", "has no rows"),
        ("x.json", "[]", "has no rows"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.parquet", "nonsense", "not a readable parquet file"),
        ("x.csv", "a,b", "none of .jsonl"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="x\\.") as caught:
        read_rows(task(name), tmp_path)
    assert said in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UsageError, match="not a text file in UTF-8"):
        read_rows(task("x.jsonl"), tmp_path)


def test_a_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "capitals.jsonl").write_text("{}")
    with pytest.raises(UsageError, match=r"task 't': .*capitols\.jsonl: no such file\. Did you mean 'capitals\.jsonl'"):
        read_rows(task("capitols.jsonl"), tmp_path)
    with pytest.raises(UsageError, match=r"no such file\.$"):
        read_rows(task("other/zzz.parquet"), tmp_path)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        read_rows(task("d.json"), tmp_path)


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
