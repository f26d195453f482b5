"""A text as tokens that know where in it they stand, and stretches of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One answer as token positions: its first, one past its content, one past its turn."""

    first: int
    content_end: int
    end: int


class Tokens:
    """A tokenised text that knows which tokens lie before a character."""

    def __init__(self, tokenizer: Any, text: str, *, add_special_tokens: bool) -> None:
        self._tokenizer, self._text, self._special = tokenizer, text, add_special_tokens
        self._ends: list[int] | None = None
        if tokenizer.is_fast:
            found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
            self._ends = []
            for _, end in found["offset_mapping"]:
                # special tokens that stand for no text come as (0, 0)
                self._ends.append(max(end, self._ends[-1] if self._ends else 0))
            self.ids: list[int] = found["input_ids"]
        else:
            self.ids = self._ids(text)

    def before(self, character: int) -> int:
        """How many tokens end at or before ``character``."""
        if self._ends is None:
            return _common(self._ids(self._text[:character]), self.ids)
        return bisect_right(self._ends, character)

    def up_to(self, character: int) -> int:
        """How many tokens begin before ``character``: a token that straddles it counts."""
        count = self.before(character)
        if self._ends is None:
            return count
        reached = self._ends[count - 1] if count else 0
        return count + (reached < character and count < len(self.ids))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=self._special)["input_ids"])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def runs_of(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of ones as (first, one past the last)."""
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
