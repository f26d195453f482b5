"""Part expressions: how a recipe says "the first eight layers of the language model"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ktmerge.errors import UsageError, did_you_mean

EXAMPLE = "e.g. 'vision', 'connector', 'llm.layers[0:8]', 'llm.layers[-1], norm'"
STACKS = ("llm", "vision", "audio", "encoder")
PARTS = (*STACKS, "connector", "embed", "head", "norm", "other")
_LANGUAGE_MODEL = frozenset({"embed", "head", "norm"})
_TERM = re.compile(r"^(?P<name>[A-Za-z_]+)(?P<layers>\.layers(\[(?P<index>[^\]]*)\])?)?$")
_INDEX = re.compile(r"^-?\d{1,9}$")
_SLICE = re.compile(r"^(-?\d{1,9})?:(-?\d{1,9})?(?::([1-9]\d{0,8})?)?$")


@dataclass(frozen=True)
class _Term:
    name: str
    layers: bool = False
    index: int | None = None
    span: slice | None = None

    def matches(self, part: str, counts: Mapping[str, int]) -> bool:
        tower, layered, number = part.partition(".layers[")
        if not layered:
            tower, _, rest = part.partition(".")
            if self.layers:
                return False
            return self.name in (tower, rest) or (self.name == "llm" and part in _LANGUAGE_MODEL)
        if tower != self.name:
            return False
        layer = int(number.rstrip("]"))
        if self.index is not None:
            return layer == (self.index if self.index >= 0 else self.index + self._count(counts))
        if self.span is not None:
            return layer in range(*self.span.indices(self._count_if_needed(counts, layer)))
        return True

    def _count_if_needed(self, counts: Mapping[str, int], layer: int) -> int:
        bounds = [] if self.span is None else [self.span.start, self.span.stop]
        relative = any(bound is not None and bound < 0 for bound in bounds)
        return self._count(counts) if relative else max(layer + 1, counts.get(self.name, 0))

    def _count(self, counts: Mapping[str, int]) -> int:
        if self.name not in counts:
            raise UsageError(f"part '{self.name}.layers' is counted from its end, but the model's layers aren't known.")
        return counts[self.name]


@dataclass(frozen=True)
class PartExpression:
    """A comma-separated list of parts; a part with ``.layers[...]`` takes a number or a slice, as Python reads them.

    ``llm`` covers the language model's layers, embeddings, final norm and head; ``vision`` all of the vision tower.
    """

    terms: tuple[_Term, ...]

    @classmethod
    def parse(cls, text: str) -> PartExpression:
        """Read an expression.

        Raises:
            UsageError: it is malformed, or names a part no model can have.
        """
        if not text.strip():
            raise UsageError(f"a part expression is empty; write one, {EXAMPLE}.")
        return cls(tuple(_term(piece.strip(), text) for piece in text.split(",")))

    def matches(self, part: str, layers: Mapping[str, int] | None = None) -> bool:
        """Whether a part is among those named.

        Args:
            part: as `Parts.of` returns it.
            layers: `Parts.layers`; needed by expressions that count from the end.

        Raises:
            UsageError: the expression counts from the end, and ``layers`` doesn't say where that is.
        """
        return any(term.matches(part, layers or {}) for term in self.terms)


def _term(piece: str, text: str) -> _Term:
    match = _TERM.match(piece)
    if match is None:
        raise UsageError(f"part '{text}': can't read '{piece}'; write it like one of these, {EXAMPLE}.")
    name, index = match["name"], match["index"]
    if name not in PARTS:
        raise UsageError(f"part '{text}': there is no part '{name}'.{did_you_mean(name, PARTS)}")
    if match["layers"] is None:
        return _Term(name)
    if name not in STACKS:
        raise UsageError(f"part '{text}': '{name}' has no layers; only {', '.join(STACKS)} have.")
    if index is None:
        return _Term(name, layers=True)
    index = index.replace(" ", "")
    if _INDEX.match(index):
        return _Term(name, layers=True, index=int(index))
    bounds = _SLICE.match(index)
    if bounds is None:
        raise UsageError(f"part '{text}': can't read the layers '[{index}]'; write a number or a slice, {EXAMPLE}.")
    start, stop, step = (None if bound is None else int(bound) for bound in bounds.groups())
    return _Term(name, layers=True, span=slice(start, stop, step))
