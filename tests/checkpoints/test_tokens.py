"""Which token a row belongs to, read off a tokenizer's files."""

from __future__ import annotations

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
