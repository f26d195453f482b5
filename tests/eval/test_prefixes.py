"""Common beginnings are read once, and nothing is lost or moved by it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ktmerge.eval.encode import Request
from ktmerge.eval.passes import Pass, plan_passes
from ktmerge.eval.prefixes import Group, share_prefixes


def asked(shared: list[int], contexts: int, seed: int = 0) -> list[Request]:
    source = random.Random(seed)
    return [
        Request((*shared, *(source.randrange(100, 200) for _ in range(5))), (source.randrange(200, 300), 7))
        for _ in range(contexts)
    ]


def read(groups: list[Group]) -> int:
    return sum(len(group.prefix) + sum(len(one.tokens) for one in group.passes) for group in groups)


def test_worked_examples_are_read_once() -> None:
    passes = plan_passes(asked(list(range(60)), 10), pack=True)
    (group,) = share_prefixes(passes)
    assert group.prefix == tuple(range(60))
    assert read([group]) == 60 + 10 * 6


def test_every_subject_has_its_own() -> None:
    first, second = list(range(60)), [1000 + i for i in range(60)]
    passes = plan_passes(asked(first, 10) + asked(second, 10, 1), pack=False)
    assert {group.prefix for group in share_prefixes(passes)} == {tuple(first), tuple(second)}


def test_little_in_common_is_not_worth_it() -> None:
    (group,) = share_prefixes(plan_passes(asked([1], 20), pack=False))
    assert group.prefix == ()


def test_an_item_that_ends_inside_the_others_beginning_keeps_its_logits() -> None:
    requests = [Request(tuple(range(50)), (50, 51, 52, 53, 54 + i)) for i in range(3)]
    requests += [Request(tuple(range(80)), (80, 90 + i, 7)) for i in range(3)]
    groups = share_prefixes(plan_passes(requests, pack=False), cost=0)
    assert max(len(group.prefix) for group in groups) <= 79
    for group in groups:
        assert all(place >= 0 for one in group.passes for _, places in one.targets for place in places)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), min_size=1,
             max_size=4)), min_size=1, max_size=20),
    st.booleans(), st.sampled_from([0, 3, 32]),
)  # fmt: skip
def test_nothing_is_lost(pairs: list[tuple[list[int], list[int]]], pack: bool, cost: int) -> None:
    requests = [Request(tuple(context), tuple(continuation)) for context, continuation in pairs]
    passes = plan_passes(requests, pack=pack)
    groups = share_prefixes(passes, cost)
    assert read(groups) <= sum(len(one.tokens) for one in passes)

    def plain(one: Pass, prefix: tuple[int, ...] = ()) -> tuple[object, ...]:
        shift = len(prefix)
        return (
            prefix + one.tokens,
            tuple((start + shift, stop + shift) for start, stop in one.branches),
            tuple((i, tuple(place + shift for place in places)) for i, places in one.targets),
        )

    assert sorted(plain(one, group.prefix) for group in groups for one in group.passes) == sorted(map(plain, passes))
