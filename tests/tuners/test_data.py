"""Data files: four formats in three kinds of file, and every way they can be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.tuners.data import ChatSample, Message, PlainSample, read_data

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
}
CHAT = (Message("user", "Hi"), Message("assistant", "Hello"))


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", list(ROWS))
def test_every_format_in_every_kind_of_file(tmp_path: Path, name: str, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [ROWS[name], ROWS[name]])
    data = read_data([path.name], tmp_path)
    assert data.formats == (name,)
    assert data.digests == (hashlib.sha256(path.read_bytes()).hexdigest(),)
    assert len(data.samples) == 2
    where = "data.jsonl:1" if suffix == ".jsonl" else f"data{suffix}, row 1"
    expected = PlainSample("Hi", "Hello", where) if name == "prompt_completion" else ChatSample(CHAT, where)
    assert data.samples[0] == expected


def test_files_of_different_formats_are_joined_in_order(tmp_path: Path) -> None:
    for name, row in ROWS.items():
        write(tmp_path / f"{name}.jsonl", [row])
    data = read_data([f"{name}.jsonl" for name in ROWS], tmp_path)
    assert data.formats == tuple(ROWS)
    assert [type(sample) for sample in data.samples] == [ChatSample, ChatSample, ChatSample, PlainSample]


def test_content_decides_the_kind_of_file_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("\ufeff" + json.dumps(ROWS["alpaca"]) + "\n\n" + json.dumps(ROWS["alpaca"]))
    assert len(read_data(["data.json"], tmp_path).samples) == 2


def test_alpaca_joins_instruction_and_input_and_takes_a_system_turn(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "text": "ignored"}
    write(tmp_path / "a.jsonl", [row, {"instruction": "Add", "output": "3", "input": None}])
    first, second = read_data(["a.jsonl"], tmp_path).samples
    assert isinstance(first, ChatSample)
    assert first.messages == (Message("system", "Be brief."), Message("user", "Add\n\n1 2"), Message("assistant", "3"))
    assert isinstance(second, ChatSample)
    assert second.messages[0].content == "Add"


def test_only_the_completion_of_a_conversation_is_trained(tmp_path: Path) -> None:
    turns = ROWS["messages"]["messages"]
    write(tmp_path / "a.jsonl", [{"prompt": [*turns, turns[0]], "completion": [turns[1]]}])
    (sample,) = read_data(["a.jsonl"], tmp_path).samples
    assert isinstance(sample, ChatSample)
    assert sample.messages == CHAT * 2
    assert sample.trained_from == 3


def test_text_parts_are_joined_and_other_parts_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}]}
    write(tmp_path / "a.jsonl", [good])
    (sample,) = read_data(["a.jsonl"], tmp_path).samples
    assert isinstance(sample, ChatSample)
    assert sample.messages == CHAT
    write(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}])
    with pytest.raises(UsageError, match="content of turn 1 of messages is not text or an image, but audio"):
        read_data(["b.jsonl"], tmp_path)


def conversation(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            conversation(("usr", "a"), ("assistant", "b")),
            "turn 1 of messages has the unknown role 'usr'; known: system",
        ),
        (conversation(("user", "a")), "no assistant turn"),
        (conversation(("user", "a"), ("assistant", " ")), "an assistant turn is empty"),
        (conversation(("user", "a"), ("assistant", None)), "content of turn 2 of messages is not text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages is text; it must be a list"),
        ({"messages": [{"content": "a"}]}, "turn 1 of messages has no role and content"),
        ({"other": 1}, "messages missing; the file is messages by its first row"),
        (conversation(("user", "a"), ("assistant", "\ud800")), "half a character"),
        (conversation(("user", [{"type": "text", "text": None}])), "the text in turn 1 of messages is missing"),
        ([1], "a row is an object with named values, not a list"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    write(tmp_path / "a.jsonl", [ROWS["messages"], row])
    with pytest.raises(UsageError) as caught:
        read_data(["a.jsonl"], tmp_path)
    assert str(caught.value).startswith("a.jsonl:2: ")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"prompt": "a", "completion": None}, "both be text, or both lists"),
        ({"prompt": "a", "completion": 3}, "both be text, or both lists"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "both be text, or both lists"),
    ],
)
def test_a_malformed_prompt_completion_is_named(tmp_path: Path, row: Any, message: str) -> None:
    write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UsageError, match=message):
        read_data(["a.jsonl"], tmp_path)


def test_columns_of_bytes_are_called_that(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"prompt": b"a", "completion": 1.5}])
    with pytest.raises(UsageError, match=r"a\.parquet, row 1: .* here they are bytes and a number"):
        read_data(["a.parquet"], tmp_path)


def test_problems_of_all_files_are_told_together_up_to_five(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [conversation(("user", "a")) for _ in range(4)])
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n{"prompt": "a", "completion": ""}\n')
    with pytest.raises(UsageError) as caught:
        read_data(["a.jsonl", "b.jsonl", "missing.jsonl"], tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[4].startswith("b.jsonl:2: not valid JSON")
    assert lines[5] == "... and 2 more problems in the data."


def test_unknown_columns_are_shown_with_the_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(UsageError) as caught:
        read_data(["a.jsonl"], tmp_path)
    assert "its columns (answer, question)" in str(caught.value)
    for name in ("messages", "ShareGPT", "alpaca", "prompt-completion"):
        assert name in str(caught.value)


def test_columns_are_named_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"b\nc": 1, **{f"x{number:02}": 1 for number in range(30)}}])
    with pytest.raises(UsageError, match=r"its columns \(b\\nc, x00, .*, x18, \.\.\.\) are in no"):
        read_data(["a.jsonl"], tmp_path)


def test_a_format_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{**ROWS["alpaca"], **ROWS["messages"]}])
    assert read_data(["a.jsonl"], tmp_path, "alpaca").formats == ("alpaca",)
    with pytest.raises(UsageError, match="format sharegpt needs the columns conversations; found input, instruction"):
        read_data(["a.jsonl"], tmp_path, "sharegpt")


def test_unreadable_files_are_told_beside_malformed_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [ROWS["alpaca"]])
    with pytest.raises(UsageError, match=r"^trian\.jsonl: no such file\. Did you mean 'train\.jsonl'\?$"):
        read_data(["trian.jsonl", "train.jsonl"], tmp_path)
    with pytest.raises(UsageError, match="is a folder"):
        read_data(["."], tmp_path)


def test_a_row_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    image = '{"path": ' * 600 + '"a.png"' + "}" * 600
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", "completion": "b", "image": {image}}}\n')
    with pytest.raises(UsageError, match=r"^a\.jsonl:1: .*nested too deeply"):
        read_data(["a.jsonl"], tmp_path)
