from __future__ import annotations

import random

import pytest

from ktmerge.eval.encode import Request
from ktmerge.eval.passes import Pass, batches, plan_passes


def request(context: str, continuation: str) -> Request:
    return Request(tuple(map(ord, context)), tuple(map(ord, continuation)))


def visible(one: Pass, position: int) -> str:
    """What the token at ``position`` sees, itself included."""
    for start, stop in one.branches:
        if start <= position < stop:
            prefix = one.branches[0][0]
            return "".join(map(chr, one.tokens[:prefix] + one.tokens[start : position + 1]))
    return "".join(map(chr, one.tokens[: position + 1]))


def check_targets(requests: list[Request], passes: list[Pass]) -> None:
    """Every request is served exactly once, and each of its tokens is predicted from just what stands before it."""
    served = {}
    for one in passes:
        for owner, positions in one.targets:
            assert owner not in served
            served[owner] = [visible(one, position) for position in positions]
    for i, asked in enumerate(requests):
        text = "".join(map(chr, asked.context + asked.continuation))
        first = len(asked.context)
        assert served[i] == [text[: first + k] for k in range(len(asked.continuation))]


def test_choices_of_one_token_cost_one_pass() -> None:
    requests = [request("question", letter) for letter in "ABCD"]
    (one,) = plan_passes(requests, pack=False)
    assert one.tokens == requests[0].context
    check_targets(requests, [one])


def test_an_input_that_begins_another_needs_no_pass() -> None:
    requests = [request("abc", "d"), request("abc", "dxyz"), request("a", "bcdx"), request("abd", "e")]
    passes = plan_passes(requests, pack=False)
    assert sorted(len(one.tokens) for one in passes) == [3, 6]
    check_targets(requests, passes)


def test_different_choices_stand_side_by_side() -> None:
    requests = [request("a long question", " yes"), request("a long question", " no"), request("a long question", "!")]
    (one,) = plan_passes(requests, pack=True)
    prefix = len("a long question ")  # both begin with the same space
    assert one.branches == [(prefix, prefix + 1), (prefix + 1, prefix + 3)] or len(one.branches) == 2
    assert len(one.tokens) == prefix + 1 + 2
    check_targets(requests, [one])
    assert len(plan_passes(requests, pack=False)) == 2


def test_packing_must_be_worth_it() -> None:
    requests = [request("ab", "a very long answer"), request("ab", "quite another answer")]
    assert all(not one.branches for one in plan_passes(requests, pack=True))


@pytest.mark.parametrize("pack", [True, False])
def test_random_requests_are_all_served(pack: bool) -> None:
    source = random.Random(5)
    requests = []
    for _ in range(200):
        context = "".join(source.choices("ab", k=source.randint(1, 12)))
        requests += [request(context, "".join(source.choices("abc", k=source.randint(1, 4)))) for _ in range(4)]
    check_targets(requests, plan_passes(requests, pack))


def test_batches_are_bounded_sorted_and_complete() -> None:
    source = random.Random(1)
    passes = [Pass(tuple(range(source.randint(1, 50))), targets=[(i, [0] * source.randint(1, 9))]) for i in range(100)]
    found = list(batches(passes, sequences=7, tokens=120, scored=20))
    for batch in found:
        longest = max(len(one.tokens) for one in batch)
        assert len(batch) <= 7
        assert len(batch) == 1 or longest * len(batch) <= 120
        assert len(batch) == 1 or sum(one.scored for one in batch) <= 20
    assert sorted(one.targets[0][0] for batch in found for one in batch) == list(range(100))
    lengths = [len(one.tokens) for batch in found for one in batch]
    assert lengths == sorted(lengths, reverse=True)
