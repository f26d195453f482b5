"""Which token a row belongs to, read off a tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktmerge.checkpoints.tokens import read_tokens


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_of_a_vocabulary_ends_where_a_line_of_a_file_does(tmp_path: Path, end: str) -> None:
    """Other separators of Unicode are tokens, or parts of them."""
    tokens = ["[PAD]", "\u2028", "a\x0bb", "\x85", "\x1c", "", "z"]
    (tmp_path / "vocab.txt").write_bytes(("\n".join(tokens) + end).encode())
    assert read_tokens(tmp_path) == {token: number for number, token in enumerate(tokens)}
    (tmp_path / "vocab.txt").write_text("")
    assert read_tokens(tmp_path) == {}


@pytest.mark.parametrize("number", ["²", pytest.param("1" * 5000, id="long"), "x"])
def test_what_is_no_number_is_no_rows(tmp_path: Path, number: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {number: "a", "7": "b"}}))
    assert read_tokens(tmp_path) == {"a": -1, "b": 7}
