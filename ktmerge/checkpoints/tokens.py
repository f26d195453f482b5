"""Which token a row of the embedding belongs to, as the tokenizer's files say. Reads JSON and text only.

A vocabulary that is only in a binary file (``tokenizer.model``) is not read.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.regular import read_regular

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
"""What `read_tokens` reads."""
_NUMBER = re.compile(r"^\d{1,18}$")


def read_tokens(root: Path) -> dict[str, int]:
    """The number of every token that the files in ``root`` list; empty if none does. What is no JSON is ignored."""
    whole, config = read_object(root / "tokenizer.json"), read_object(root / "tokenizer_config.json")
    vocabulary = mapping(whole.get("model")).get("vocab")
    tokens: dict[str, Any]
    if isinstance(vocabulary, Mapping):
        tokens = {str(token): number for token, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # of [token, score], as Unigram has it
        tokens = {str(entry[0]): number for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    else:
        tokens = dict(read_object(root / "vocab.json"))
        # split("\n"), not splitlines(): a token may hold, or be, another line separator of Unicode
        lines = read_text(root / "vocab.txt").removesuffix("\n").split("\n")
        tokens = tokens or {token: number for number, token in enumerate(lines) if lines != [""]}
    tokens |= read_object(root / "added_tokens.json")
    for number, entry in mapping(config.get("added_tokens_decoder")).items():
        tokens[content(entry)] = int(number) if _NUMBER.match(str(number)) else -1
    added = whole.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        tokens[content(entry)] = entry.get("id", -1) if isinstance(entry, Mapping) else -1
    return {token: number for token, number in tokens.items() if isinstance(number, int)}


def same_tokens(first: Path, second: Path) -> bool:
    """Whether two folders' tokenizers are alike byte by byte, so that nothing need be read to compare them."""
    there = [file for file in FILES if (first / file).exists() or (second / file).exists()]
    try:
        return all(filecmp.cmp(first / file, second / file, shallow=False) for file in there)
    except OSError:
        return False


def content(entry: Any) -> str:
    """The text of a token that is given as such, or described."""
    return str(entry.get("content", "")) if isinstance(entry, Mapping) else str(entry)


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_text(path: Path) -> str:
    """A text file; empty if there is none."""
    try:
        return read_regular(path).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
