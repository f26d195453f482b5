"""Texts cut into chunks, and where words begin in them. Pure functions."""

from __future__ import annotations

import re
from itertools import pairwise


def word_starts(text: str) -> list[int]:
    """Where words begin, in bytes of UTF-8; words are what stands between white space."""
    found, at = [], 0
    for piece in re.findall(r"\s+|\S+", text):
        if not piece[0].isspace():
            found.append(at)
        at += len(piece.encode("utf-8", "surrogatepass"))
    return found


def even_chunks(tokens: int, size: int) -> list[tuple[int, int]]:
    """Cut ``tokens`` tokens into the fewest chunks of at most ``size``, lengths differing by at most one.

    Even, because a short rest at the end would have its own, noisier accuracy. A chunk of one has nothing to score.
    """
    count = -(-tokens // size)
    bounds = [tokens * i // count for i in range(count + 1)] if count else []
    return [(start, stop) for start, stop in pairwise(bounds) if stop - start > 1]
