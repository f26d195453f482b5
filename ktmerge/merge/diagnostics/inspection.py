"""What was found in a base and its fine-tunes, by part and by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import Any, TypeVar

from ktmerge.merge.diagnostics.commonality import Commonality
from ktmerge.merge.diagnostics.differences import Differences
from ktmerge.merge.diagnostics.kinds import KINDS
from ktmerge.merge.diagnostics.measures import ALL, QUANTILES, Effective, Movement, Pair, Spread
from ktmerge.merge.diagnostics.table import Table, tables

T = TypeVar("T", Movement, Spread, Pair, Commonality)


@dataclass(frozen=True)
class Contents:
    """What one part of the base consists of."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtypes: tuple[str, ...] = ()

    def __add__(self, other: Contents) -> Contents:
        return Contents(
            self.tensors + other.tensors,
            self.parameters + other.parameters,
            self.nbytes + other.nbytes,
            tuple(dict.fromkeys(self.dtypes + other.dtypes)),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": list(self.dtypes),
        }


@dataclass
class Inspection:
    """What was found. Layers are ``llm.layers[3]``; a part, ``llm.layers``, is all of a stack's layers together.

    Methods take a layer, a part, or `ALL`.

    Attributes:
        contents: what the base consists of, by part, in the order in which a model uses them.
        layers: the same parts, with every layer of a stack by itself.
        differences: per tuned model.
        movements: per tuned model, by layer and kind of tensor; empty if only headers were read.
        matrices: per tuned model, its matrices together: what F-1 asks of a right base.
        coverage: per tuned model, the share of the base's weights that it has, too; the rest is not measured.
        spreads: per tuned model, by layer.
        pairs: per two tuned models, by layer.
        changed_by: by layer, how many tuned models changed each of its tensors.
        common: by layer, what the changes of its matrices have in common; empty unless asked for.
        broken: (model, tensor) -> values that are infinite or NaN; the base is ``""``.
        warnings: what should make one stop.
    """

    contents: dict[str, Contents]
    layers: list[str]
    differences: dict[str, Differences] = field(default_factory=dict)
    movements: dict[str, dict[tuple[str, str], Movement]] = field(default_factory=dict)
    matrices: dict[str, Movement] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], dict[str, Pair]] = field(default_factory=dict)
    changed_by: dict[str, list[int]] = field(default_factory=dict)
    common: dict[str, Commonality] = field(default_factory=dict)
    broken: dict[tuple[str, str], int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """The tuned models whose weights were read."""
        return list(self.movements)

    def movement(self, model: str, part: str, kind: str | None = None) -> Movement | None:
        """How far a model moved there, or in one kind of the tensors; None if it has none of them."""
        cells = self.movements[model]
        if (part, kind) in cells:
            return cells[part, str(kind)]
        return _total(moved for (at, what), moved in cells.items() if kind in (None, what) and _within(at, part))

    def spread(self, model: str, part: str) -> Spread | None:
        """The distances in ulps."""
        return _total(spread for at, spread in self.spreads[model].items() if _within(at, part))

    def pair(self, first: str, second: str, part: str) -> Pair | None:
        """Two models beside each other."""
        return _total(pair for at, pair in self.pairs[first, second].items() if _within(at, part))

    def commonality(self, part: str) -> Commonality | None:
        """What the changes there have in common; None if no matrix was changed by two models, or nobody asked."""
        return _total(one for at, one in self.common.items() if _within(at, part))

    def effective(self, part: str) -> Effective | None:
        """N_eff of the tensors; None if none was measured."""
        counts = [count for at, found in self.changed_by.items() if _within(at, part) for count in found]
        return Effective.of(counts) if counts else None

    def kinds(self, part: str) -> list[str]:
        """The kinds of tensors."""
        found = {what for cells in self.movements.values() for at, what in cells if _within(at, part)}
        return [kind for kind in KINDS if kind in found]

    def total(self) -> Contents:
        """What the base consists of altogether."""
        return reduce(add, self.contents.values())

    def tables(self, *, layers: bool = False) -> Iterator[Table]:
        """What people read: columns, rows and title of each table; with ``layers``, every layer by itself."""
        return tables(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "base": {part: one.to_json() for part, one in {**self.contents, ALL: self.total()}.items()},
            "differences": {name: one.to_json() for name, one in self.differences.items()},
            "models": {
                name: {"coverage": _digits(self.coverage[name]), **self._everywhere(partial(self._moved, name))}
                for name in self.models
            },
            "pairs": [{"models": list(two), **self._everywhere(partial(self._paired, *two))} for two in self.pairs],
            "effective_experts": self._everywhere(lambda part, _: (one := self.effective(part)) and one.to_json()),
            **({"common": self._everywhere(self._shared)} if self.common else {}),
            "warnings": self.warnings,
        }

    def _everywhere(self, tell: Callable[[str, bool], Any]) -> dict[str, Any]:
        """What there is to tell of each part, and of each layer; ``tell`` is given which of them, and if it is one."""
        places = {"parts": [*self.contents, ALL], "layers": self.layers}
        return {
            key: {place: told for place in listed if (told := tell(place, key == "layers")) is not None}
            for key, listed in places.items()
        }

    def _shared(self, part: str, _: bool) -> dict[str, Any] | None:
        one = self.commonality(part)
        return None if one is None else one.to_json()

    def _moved(self, model: str, part: str, kinds: bool) -> dict[str, Any] | None:
        moved, spread = self.movement(model, part), self.spread(model, part)
        if moved is None or spread is None:
            return None
        ulps = {name: spread.quantile(share) for name, share in QUANTILES.items()} | {"max": spread.largest}
        found = {**_norms(moved), "elements": moved.elements, "ulps": ulps}
        if kinds:
            cells = {kind: self.movement(model, part, kind) for kind in self.kinds(part)}
            found["kinds"] = {kind: _norms(cell) for kind, cell in cells.items() if cell is not None}
        return found

    def _paired(self, first: str, second: str, part: str, _: bool) -> dict[str, Any] | None:
        pair = self.pair(first, second, part)
        return None if pair is None else {
            "cosine": _digits(pair.cosine), "sign_conflict": _digits(pair.conflict), "changed_by_both": pair.both,
        }  # fmt: skip


def stack_of(layer: str) -> str:
    """The part that a layer belongs to, without its number."""
    return layer.partition("[")[0]


def _within(layer: str, part: str) -> bool:
    return part in (layer, ALL) or ("[" not in part and stack_of(layer) == part)


def _total(found: Iterable[T]) -> T | None:
    listed = list(found)
    return reduce(add, listed) if listed else None


def _norms(moved: Movement) -> dict[str, Any]:
    return {"relative_norm": _digits(moved.relative), "changed": _digits(moved.share)}


def _digits(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
