"""Rows of data files: three kinds of file, and every way they can be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ktmerge.recipes.rows import listing, read_rows

VALUES = [{"a": 1, "b": "é"}, {"a": 2, "b": "ö"}]


def test_reads_lines_lists_and_parquet_alike_whatever_they_are_called(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "\n".join(json.dumps(value) for value in VALUES)
    (tmp_path / "x.jsonl").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    (tmp_path / "x.json").write_text(json.dumps(VALUES, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "lines").write_text(lines)
    pq.write_table(pa.Table.from_pylist(VALUES), tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist(VALUES), tmp_path / "parquet.bin")
    for name in ("x.jsonl", "x.json", "lines.json", "lines", "x.parquet", "parquet.bin"):
        found = read_rows(tmp_path / name, name)
        assert found.problems == []
        assert [row.values for row in found.rows] == VALUES, name
        assert [row.number for row in found.rows] == [0, 1]
        assert found.digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert found.rows[1].where == (f"{name}:2" if "lines" in name or name == "x.jsonl" else f"{name}, row 2")


def test_lines_are_numbered_with_the_blank_ones_and_split_at_newlines_only(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n\ufeff{"a": "b\u2028c"}\n', encoding="utf-8")
    rows = read_rows(tmp_path / "x.jsonl", "x.jsonl").rows
    assert [(row.number, row.where) for row in rows] == [(0, "x.jsonl:1"), (1, "x.jsonl:3")]
    assert rows[1].values == {"a": "b\u2028c"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "x.jsonl:2: not valid JSON: Expecting value (column 7)."),
        ("x.jsonl", b'{"a": 1}\n[1]\n', "x.jsonl:2: a row is an object with named values, not a list."),
        ("x.json", b'[{"a": 1}, 3]', "x.json, row 2: a row is an object with named values, not a number."),
        ("x.jsonl", b"null\n", "x.jsonl:1: a row is an object with named values, not null."),
        ("x.jsonl", b"\n\n", "x.jsonl: there are no rows in it."),
        ("x.json", b"[]", "x.json: there are no rows in it."),
        ("x.json", b'[{"a": 1},]', "x.json: not valid JSON: Expecting value (line 1, column 11)."),
        ("x.json", b"[\n {", "x.json: not valid JSON: Expecting property name"),
        ("x.json", b"[" * 100_000, "x.json: not valid JSON: nested too deeply"),
        ("x.json", b'{\n "data":\n []}', "x.json: is one JSON object; it must be a list of rows, or one row a line."),
        ("x.parquet", b"nonsense", "x.parquet: not valid parquet: "),
        ("x.jsonl", b"PAR1 and then nothing", "x.jsonl: not valid parquet: "),
        ("x.jsonl", b'{"a": "\xff"}', "x.jsonl: is neither parquet nor text in UTF-8 (line 1, byte 7); save it"),
        ("x.txt", b"a,b\n1,2\n", "x.txt: is none of .jsonl, .ndjson, .json, .csv, .tsv, .parquet."),
        ("x.csv", b"a,b\n1,2\n3\n", "x.csv:3: 1 cells under 2 columns."),
        ("x.csv", b"a,a\n1,2\n", "x.csv: its first line must name the columns, each differently."),
        ("x.csv", b"a,b\n", "x.csv: there are no rows in it."),
        ("x.tsv", b'a\tb\n"1\t2\n', "x.tsv: not a valid table: unexpected end of data"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    (problem,) = read_rows(tmp_path / name, name).problems
    assert problem.startswith(said)


def test_all_broken_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{oops\n{"a": 2}\n3\n')
    found = read_rows(tmp_path / "x.jsonl", "x.jsonl")
    assert [problem.partition(": ")[0] for problem in found.problems] == ["x.jsonl:2", "x.jsonl:4"]
    assert [row.number for row in found.rows] == [0, 2]


def test_what_is_not_there_suggests_what_is(tmp_path: Path) -> None:
    (tmp_path / "capitals.jsonl").write_text("{}")
    (missing,) = read_rows(tmp_path / "capitols.jsonl", "capitols.jsonl").problems
    assert missing == "capitols.jsonl: no such file. Did you mean 'capitals.jsonl'?"
    (away,) = read_rows(tmp_path / "other/zzz.parquet", "other/zzz.parquet").problems
    assert away == "other/zzz.parquet: no such file (there is no folder other)."
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    assert "dangling" not in read_rows(tmp_path / "dangling.jsonl", "data").problems[0]
    (folder,) = read_rows(tmp_path, "data").problems
    assert folder == "data: is a folder; name the data files in it. Valid: capitals.jsonl."


@pytest.mark.parametrize("name", ["a\0b.jsonl", "\ud800.jsonl"])
def test_what_no_file_can_be_called_is_told(tmp_path: Path, name: str) -> None:
    assert read_rows(tmp_path / name, name).problems == [f"{name!r} names no file."]


def test_parquet_whose_texts_are_no_texts_is_told(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "x.parquet")
    (problem,) = read_rows(tmp_path / "x.parquet", "x.parquet").problems
    assert problem.startswith("x.parquet: not valid parquet: ")


def test_a_device_without_end_is_not_read() -> None:
    assert read_rows(Path("/dev/zero"), "data").problems == ["data: is a device, no file."]


def test_a_listing_shows_five_and_counts_the_rest() -> None:
    assert listing(["a", "b"]) == "a\nb"
    assert listing([str(n) for n in range(7)]) == "0\n1\n2\n3\n4\n... and 2 more problems in the data."
