"""Items in one order for all candidates, cut into rounds: few first, more for those still in the race."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ktmerge.eval.encode import Encoded
from ktmerge.eval.sets import TaskSet, encode_sets
from ktmerge.eval.statistics import groups_of
from ktmerge.recipes.suites import Side, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight

ItemScores = dict[str, list[float]]
"""By set, the scores of its items, in [0, 1] (CIDEr goes to 10)."""

_WHOLE = ("cider",)
"""Metrics whose item scores depend on what else is in the set."""


@dataclass(frozen=True)
class Round:
    """Some items of every set; no item is in two rounds."""

    sets: list[TaskSet]
    encoded: Mapping[str, Encoded]


@dataclass(frozen=True)
class ScoredSet:
    """A set as statistics see it.

    Attributes:
        side: upstream or downstream.
        groups: of each item, in the order of its scores, what it is drawn with: chunks of one text go together.
    """

    side: Side
    groups: Sequence[int]


Sets = Mapping[str, ScoredSet]
"""By name."""


def cut(
    sets: Sequence[TaskSet],
    ends: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    sight: Sight | None = None,
) -> list[Round]:
    """Cut the sets into rounds.

    Args:
        sets: what is scored.
        ends: the share of every set's items at which each round ends, ascending, the last one 1. A round of a set too
            small for that is empty; a set whose items cannot be told apart, or that lm_eval asks, is in the first round
            as a whole.
        tokenizer: the model's.
        max_length: tokens the model reads.
        sight: prepares images, where there are any.
    """
    whole = [_scorable(one, tokenizer, max_length, sight) for one in sets]
    found = []
    for before, end in zip([0.0, *ends], ends, strict=False):
        chosen = [part for one in whole if (part := _between(one, before, end)) is not None]
        found.append(Round(chosen, encode_sets(chosen, tokenizer, max_length, sight)))
    return found


def _scorable(one: TaskSet, tokenizer: PreTrainedTokenizerBase, max_length: int | None, sight: Sight | None) -> TaskSet:
    """Without texts too short to be scored: in a round of such alone there would be nothing."""
    if not isinstance(one.task, TextTask):
        return one
    rows = set(encode_sets([one], tokenizer, max_length, sight)[one.task.name].rows)
    return replace(one, items=[item for item in one.items if item.row in rows])


def _between(one: TaskSet, before: float, end: float) -> TaskSet | None:
    if one.harness is not None or one.task.metric in _WHOLE:
        return one if before == 0 else None
    order = sorted(range(len(one.items)), key=lambda i: _place(one.task.name, one.items[i].row))
    chosen = order[math.ceil(before * len(order)) : math.ceil(end * len(order))]
    return replace(one, items=[one.items[i] for i in sorted(chosen)]) if chosen else None


def _place(name: str, row: int) -> bytes:
    return hashlib.sha256(f"round:{name}:{row}".encode()).digest()


def scored_sets(rounds: Sequence[Round]) -> Sets:
    """The sets of all rounds, their items in the order of `joined` scores."""
    sides: dict[str, Side] = {}
    rows: dict[str, list[int]] = {}
    for part in rounds:
        for one in part.sets:
            sides[one.task.name] = one.side
            rows.setdefault(one.task.name, []).extend(one.drawn_with(part.encoded[one.task.name].rows))
    return {name: ScoredSet(side, groups_of(rows[name])) for name, side in sides.items()}


def joined(rounds: Sequence[Mapping[str, Sequence[float]]]) -> ItemScores:
    """The scores of several rounds as one, set by set."""
    found: ItemScores = {}
    for scores in rounds:
        for name, own in scores.items():
            found.setdefault(name, []).extend(own)
    return found
