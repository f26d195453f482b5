"""Which passes begin alike, so that their common beginning is read once and kept as keys and values. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktmerge.eval.passes import Pass

COST = 32  # tokens that reading a beginning by itself costs: a short pass, and batches that end where a group does
SHARE = 0.03  # of a group's tokens: what an explicit mask costs


@dataclass(frozen=True)
class Group:
    """Passes behind a common beginning.

    Attributes:
        prefix: the tokens all passes begin with; empty: they share none.
        passes: what is left of them after the prefix; places in ``branches`` and ``targets`` count from there.
    """

    prefix: tuple[int, ...]
    passes: list[Pass]


def share_prefixes(passes: Sequence[Pass], cost: int = COST) -> list[Group]:
    """Group passes so that as few tokens as possible are read, each group reading its prefix once.

    A prefix ends before the first place whose logits a pass needs, and saves more than ``cost`` tokens. Passes with
    images are left whole.
    """
    order = sorted((one for one in passes if one.view is None), key=lambda one: one.tokens)
    shared: set[int] = set()
    groups = []
    for node in _chosen(order, cost):
        shared.update(range(node.start, node.stop))
        groups.append(_group(order[node.start : node.stop], node.prefix))
    rest = [one for i, one in enumerate(order) if i not in shared] + [one for one in passes if one.view is not None]
    return groups + ([Group((), rest)] if rest else [])


@dataclass
class _Node:
    """Neighbours in order, ``start`` to ``stop``, that have their first ``depth`` tokens in common."""

    depth: int
    start: int
    children: list[_Node] = field(default_factory=list)
    stop: int = 0
    prefix: int = 0
    saved: float = 0
    best: list[_Node] = field(default_factory=list)

    def close(self, stop: int, order: Sequence[Pass], cost: int) -> None:
        """Settle whether these share their prefix all together or in the groups below."""
        self.stop = stop
        own = order[self.start : stop]
        self.prefix = min([self.depth, *map(_room, own)])
        total = sum(len(one.tokens) for one in own)
        whole = self.prefix * (len(own) - 1) - cost - SHARE * total
        below = sum(child.saved for child in self.children)
        if whole > max(below, 0):
            self.saved, self.best = whole, [self]
        else:
            self.saved, self.best = below, [node for child in self.children for node in child.best]


def _chosen(order: Sequence[Pass], cost: int) -> list[_Node]:
    """The groups that save most, found bottom-up in the tree of common beginnings."""
    stack = [_Node(0, 0)]
    for i in range(len(order)):
        depth = common(order[i].tokens, order[i + 1].tokens) if i + 1 < len(order) else 0
        start, left = i, None
        while stack[-1].depth > depth:
            node = stack.pop()
            node.close(i + 1, order, cost)
            start, left = node.start, node
            if stack[-1].depth >= depth:
                stack[-1].children.append(node)
                left = None
        if stack[-1].depth < depth:
            stack.append(_Node(depth, start, [left] if left is not None else []))
    return [node for child in stack[0].children for node in child.best]


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements, from the first on, are the same in both."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _room(one: Pass) -> int:
    """How many tokens stand before the first place whose logits are needed."""
    return min(position for _, positions in one.targets for position in positions)


def _group(passes: Sequence[Pass], prefix: int) -> Group:
    rest = [
        replace(
            one,
            tokens=one.tokens[prefix:],
            branches=[(start - prefix, stop - prefix) for start, stop in one.branches],
            targets=[(i, [position - prefix for position in positions]) for i, positions in one.targets],
        )
        for one in passes
    ]
    return Group(passes[0].tokens[:prefix], rest)
