"""Ranges of bytes against a plain set of positions."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ktmerge.checkpoints.spans import Spans

ranges = st.tuples(st.integers(0, 40), st.integers(0, 40))


@settings(max_examples=40, deadline=None)
@given(st.lists(ranges, max_size=20), ranges)
def test_equals_a_set(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    first, last = sorted(asked)
    spans, positions = Spans(), set[int]()
    for start, stop in added:
        spans.add(start, stop)
        positions |= set(range(start, stop))
        prefix = next(position for position in range(42) if position not in positions)
        assert spans.prefix == prefix
        assert spans.count(first, last) == len(positions & set(range(first, last)))
