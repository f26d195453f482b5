"""Strategies that damage text, bytes and plain data, as careless tools, bad disks and strangers do."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 0.0, -0.0, 0.5,
    1e308, float("inf"), float("nan"), "", " ", "0", "a", "base", "model", "../a", "/etc/passwd", "\x00", "\x1b[2J",
    "\ud800", "é", "ß" * 300, "a.b[0:1]", "llm.layers[", "*", "[", "BF16", "F32", "U8", "C64", "F4", "I64", [], [0],
    [0, 0], [2**63, 2**63], [-1], [[]], [None], {}, {"": {}}, {"a": 1}, {"dtype": "F32"}, [1] * 70,
]  # fmt: skip
KEYS = ["", "a", "x" * 300, "__metadata__", "dtype", "\x1b", "model.norm.weight"]


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """Bytes with one to three bits flipped, stretches removed, doubled, zeroed, moved, or cut at the end."""
    found = bytearray(text)
    for _ in range(draw(st.integers(1, 3))):
        if not found:
            break
        start = draw(st.integers(0, len(found) - 1))
        stop = min(len(found), start + draw(st.integers(1, 24)))
        kind = draw(st.sampled_from(["flip", "flip", "remove", "double", "zero", "cut", "insert", "move"]))
        if kind == "flip":
            found[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "remove":
            del found[start:stop]
        elif kind == "double":
            found[start:start] = found[start:stop]
        elif kind == "zero":
            found[start:stop] = bytes(stop - start)
        elif kind == "cut":
            del found[start:]
        elif kind == "insert":
            found[start:start] = draw(st.binary(min_size=1, max_size=8))
        else:
            piece = found[start:stop]
            del found[start:stop]
            place = draw(st.integers(0, len(found)))
            found[place:place] = piece
    return bytes(found)


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A copy of plain data with one to three of its nodes replaced, removed, renamed, or swapped."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(found))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "swap"]))
        if kind == "replace":
            container[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(KEYS))] = container.pop(key)
        else:
            other, place = draw(st.sampled_from(places))
            container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(container[key])
    return found


def _places(document: Any) -> Any:
    """Every (container, key) below a document."""
    if isinstance(document, dict):
        pairs = list(document.items())
    elif isinstance(document, list):
        pairs = list(enumerate(document))
    else:
        return
    for key, value in pairs:
        yield document, key
        yield from _places(value)
