"""What is trained, as people write it: ``full``, ``last:4+head+connector``, or any part expression."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.checkpoints.expressions import PARTS, STACKS, PartExpression
from ktmerge.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from ktmerge.checkpoints.parts import Parts

HELP = "full, top:K, last:K, a part (connector, vision, llm, embed, head, llm.layers[0:8]), or several joined by '+'"
_ENDS = re.compile(r"^(top|last)\s*:\s*(\d{1,9})$")


@dataclass(frozen=True)
class TrainExpression:
    """Terms joined by ``+``; a tensor is trained if one of them names it.

    ``full`` is everything; ``top:K`` the K layers nearest to the input of the language model (the survey's Top-ST, as
    far as its words tell), ``last:K`` the K nearest to its output (Last-ST); any other term is a part expression.
    ``key`` is what it is written under, for messages.
    """

    text: str
    terms: tuple[str, ...]
    key: str = "train"

    @classmethod
    def parse(cls, text: str, key: str = "train") -> TrainExpression:
        """Read an expression.

        Args:
            text: the expression.
            key: what it is written under.

        Raises:
            UsageError: a term is none of those, or names a part no model can have.
        """
        terms = tuple(term.strip() for term in text.split("+"))
        for term in terms:
            if not term:
                raise UsageError(f"{key} '{text}': a term is empty; write {HELP}.")
            _require_readable(term, text, key)
        return cls(text, terms, key)

    @property
    def is_full(self) -> bool:
        """Whether everything is trained."""
        return "full" in self.terms

    def matcher(self, parts: Parts) -> Callable[[str], bool]:
        """A test for tensor names: is the tensor trained?

        Raises:
            UsageError: a term matches no tensor of this model, or counts more layers than there are.
        """
        if self.is_full:
            return lambda name: True
        tests = [self._test(term, parts) for term in self.terms]
        return lambda name: any(test(name) for test in tests)

    def _test(self, term: str, parts: Parts) -> Callable[[str], bool]:
        found = _ENDS.match(term)
        if found is None:
            return parts.matcher(term)
        tower = next(iter(parts.layers), None)
        if tower is None:
            raise UsageError(f"{self.key} '{term}': this model has no layers; it has {', '.join(parts.names())}.")
        count, there = int(found[2]), parts.layers[tower]
        if not 1 <= count <= there:
            raise UsageError(f"{self.key} '{term}': the model has {there} layers ({tower}.layers[0:{there}]).")
        return parts.matcher(f"{tower}.layers[{f'0:{count}' if found[1] == 'top' else f'{there - count}:'}]")


def _require_readable(term: str, text: str, key: str) -> None:
    if term == "full" or _ENDS.match(term):
        return
    name = re.split(r"[:.\[,]", term)[0].strip()
    if name in ("top", "last"):
        raise UsageError(f"{key} '{text}': write {name}:K with a number of layers, e.g. {name}:4.")
    if name not in PARTS:
        raise UsageError(
            f"{key} '{text}': can't read '{term}'.{did_you_mean(name, (*PARTS, 'full', 'top', 'last'))} "
            f"Write {HELP}; layers have {', '.join(STACKS)}."
        )
    PartExpression.parse(term)
