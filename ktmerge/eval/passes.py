"""How requests become forward passes: shared work once, sorted by length, batches of bounded size. Knows no model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ktmerge.eval.encode import Request

if TYPE_CHECKING:
    from ktmerge.eval.sight import View

WORTH_SHARING = 0.75  # of the tokens it would take otherwise; below, a packed pass costs more than it saves
LONGEST_PACKED = 2048  # tokens; its mask has the square of that many entries


@dataclass
class Pass:
    """One sequence through the model.

    Attributes:
        tokens: what goes in.
        branches: none for plain text. Else (start, stop) of continuations that stand side by side after a common prefix
            of ``branches[0][0]`` tokens: each sees the prefix and itself, and its positions count on from the prefix.
        view: the images that stand in its tokens, if any.
        targets: (request, positions in ``tokens``): the logits there predict the request's continuation in order.
    """

    tokens: tuple[int, ...]
    branches: list[tuple[int, int]] = field(default_factory=list)
    targets: list[tuple[int, list[int]]] = field(default_factory=list)
    view: View | None = None

    @property
    def scored(self) -> int:
        """How many logits this pass has to give."""
        return sum(len(positions) for _, positions in self.targets)


def plan_passes(requests: Sequence[Request], pack: bool) -> list[Pass]:
    """The passes that score ``requests``.

    A request whose input is the beginning of another one's needs no pass: a causal model's logits there are the same.
    So choices of one token each cost one pass together. With ``pack``, choices that do differ stand side by side in one
    pass behind their common prefix where that saves a quarter of the tokens; not behind images, whose positions are the
    model's own affair. Passes are shared only between requests that see the same images.
    """
    by_view: dict[View | None, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        by_view[request.view].append(i)
    passes = []
    for view, members in by_view.items():
        for one in _passes_of([requests[i] for i in members], pack and view is None):
            one.targets = [(members[i], positions) for i, positions in one.targets]
            one.view = view
            passes.append(one)
    return passes


def _passes_of(requests: Sequence[Request], pack: bool) -> list[Pass]:
    """The passes of requests that see the same images."""
    hosts = _hosts(requests)
    if not pack:
        return [_plain(requests, path, members) for path, members in hosts.items()]
    by_context: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for path, members in hosts.items():
        by_context[requests[members[0]].context].append(path)
    passes: list[Pass] = []
    for paths in by_context.values():
        prefix = _common_prefix(paths) if len(paths) > 1 else 0
        packed = sum(map(len, paths)) - prefix * (len(paths) - 1)
        if prefix and packed <= LONGEST_PACKED and packed <= WORTH_SHARING * sum(map(len, paths)):
            passes.append(_packed(requests, prefix, {path: hosts[path] for path in paths}))
        else:
            passes += [_plain(requests, path, hosts[path]) for path in paths]
    return passes


def batches(passes: Sequence[Pass], sequences: int, tokens: int, scored: int) -> Iterator[list[Pass]]:
    """Batches of passes of near-equal length, longest first (so that what doesn't fit in memory fails at once).

    No batch has passes both with and without images.

    Args:
        passes: in any order.
        sequences: at most this many passes in a batch.
        tokens: at most this many tokens with padding.
        scored: at most this many logits; a single pass may exceed both.
    """
    batch: list[Pass] = []
    longest = logits = 0
    for one in sorted(passes, key=lambda p: (p.view is None, -len(p.tokens), p.tokens)):
        full = len(batch) == sequences or (len(batch) + 1) * longest > tokens or logits + one.scored > scored
        if batch and (full or (batch[0].view is None) != (one.view is None)):
            yield batch
            batch, logits = [], 0
        if not batch:
            longest = len(one.tokens)
        batch.append(one)
        logits += one.scored
    if batch:
        yield batch


def _path(request: Request) -> tuple[int, ...]:
    return request.context + request.continuation[:-1]


def _positions(request: Request) -> list[int]:
    first = len(request.context) - 1
    return list(range(first, first + len(request.continuation)))


def _hosts(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """Inputs that are no other input's beginning, each with the requests it serves.

    In lexicographic order an input and all that begin with it stand together, so walking backwards the last host is
    the only candidate.
    """
    order = sorted(range(len(requests)), key=lambda i: _path(requests[i]), reverse=True)
    hosts: dict[tuple[int, ...], list[int]] = {}
    host: tuple[int, ...] = ()
    for i in order:
        path = _path(requests[i])
        if host[: len(path)] != path:
            host = path
            hosts[host] = []
        hosts[host].append(i)
    return hosts


def _common_prefix(paths: list[tuple[int, ...]]) -> int:
    """How many tokens all paths begin with: as many as the first and the last of them in order do."""
    first, last = min(paths), max(paths)
    different = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(different, len(first))


def _plain(requests: Sequence[Request], path: tuple[int, ...], members: list[int]) -> Pass:
    return Pass(path, targets=[(i, _positions(requests[i])) for i in members])


def _packed(requests: Sequence[Request], prefix: int, hosts: dict[tuple[int, ...], list[int]]) -> Pass:
    packed = Pass(next(iter(hosts))[:prefix])
    for path, members in hosts.items():
        start = len(packed.tokens)
        packed.tokens += path[prefix:]
        packed.branches.append((start, len(packed.tokens)))
        for i in members:
            shifted = [p if p < prefix else p - prefix + start for p in _positions(requests[i])]
            packed.targets.append((i, shifted))
    return packed
