"""What is in a checkpoint, and how far tuned models moved from it, part by part: to look at before blending.

Headers alone need no torch; the rest is one streaming pass.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints import Alignment, Checkpoint, Parts, align, tensor_class
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 20
_FAR = 0.1
"""||tau|| / ||theta_0|| of matrices above which a fine-tune of this base is unlikely."""
_ALIKE = 0.9
"""Cosine between two experts' deltas above which they learned the same, or share another base."""
_IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
_SHOWN = 3

Table = tuple[list[str], list[list[str]], str]


@dataclass
class Movement:
    """How one tuned model moved in one part: sums over its tensors."""

    base: float = 0.0
    delta: float = 0.0
    elements: int = 0
    changed: int = 0

    @property
    def relative(self) -> float:
        """||tau|| / ||theta_0||; 0 if both are 0."""
        return math.sqrt(self.delta / self.base) if self.base else (math.inf if self.delta else 0.0)

    @property
    def share(self) -> float:
        """Share of the elements that changed."""
        return self.changed / self.elements if self.elements else 0.0


@dataclass
class Pair:
    """Two tuned models in one part: inner product and norms of their deltas; signs where both changed."""

    dot: float = 0.0
    first: float = 0.0
    second: float = 0.0
    both: int = 0
    opposed: int = 0

    @property
    def cosine(self) -> float | None:
        """Of the two deltas; None if one is zero."""
        return self.dot / math.sqrt(self.first * self.second) if self.first and self.second else None

    @property
    def conflict(self) -> float | None:
        """Share of the elements changed by both that they moved in opposite directions; None if there are none."""
        return self.opposed / self.both if self.both else None


@dataclass
class Inspection:
    """What was found. Parts hold all layers of a stack together.

    Attributes:
        contents: per part of the base: tensors, parameters, bytes, types.
        differences: per tuned model, in words: names, shapes, config and files that are not the base's.
        movements: by tuned model and part; empty if only headers were read.
        pairs: by two tuned models and part.
    """

    contents: dict[str, dict[str, Any]]
    differences: dict[str, list[str]] = field(default_factory=dict)
    movements: dict[str, dict[str, Movement]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], dict[str, Pair]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def changed_by(self, part: str) -> int:
        """N_eff: how many tuned models changed this part at all."""
        return sum(parts[part].changed > 0 for parts in self.movements.values() if part in parts)

    def tables(self) -> Iterator[Table]:
        """Columns, rows and title of each table."""
        rows = [
            [part, str(c["tensors"]), f"{c['parameters'] / 1e6:.2f}", f"{c['bytes'] / 1e6:.1f}", ", ".join(c["dtypes"])]
            for part, c in self.contents.items()
        ]
        yield ["part", "tensors", "million", "MB", "types"], rows, "base"
        if self.movements:
            names = list(self.movements)
            columns = ["part", *(f"{name}: {what}" for name in names for what in ("moved by", "changed")), "changed by"]
            rows = []
            for part in self.contents:
                found = [self.movements[name].get(part, Movement()) for name in names]
                cells = [text for one in found for text in (f"{one.relative:.3%}", f"{one.share:.1%}")]
                rows.append([part, *cells, f"{self.changed_by(part)} of {len(names)}"])
            yield columns, rows, "norm of the change over norm of the base; share of elements that changed"
        if self.pairs:
            columns = ["part", *(f"{a} {b}: {what}" for a, b in self.pairs for what in ("cosine", "conflict"))]
            rows = []
            for part in self.contents:
                pairs = [parts.get(part, Pair()) for parts in self.pairs.values()]
                rows.append([part, *(text for one in pairs for text in (_number(one.cosine), _number(one.conflict)))])
            yield columns, rows, "cosine of two models' changes; share of opposite signs where both changed"
        rows = [[name, line] for name, lines in self.differences.items() for line in lines]
        if rows:
            yield ["model", "differs from the base in"], rows, ""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "base": self.contents,
            "differences": self.differences,
            "models": {
                name: {
                    part: {"relative_norm": m.relative if math.isfinite(m.relative) else None, "changed": m.share}
                    for part, m in parts.items()
                }
                for name, parts in self.movements.items()
            },
            "pairs": [
                {"models": list(names), "part": part, "cosine": pair.cosine, "sign_conflict": pair.conflict}
                for names, parts in self.pairs.items()
                for part, pair in parts.items()
            ],
            "changed_by": {part: self.changed_by(part) for part in self.contents} if self.movements else {},
            "warnings": self.warnings,
        }


def inspect(
    base: Path, tuned: Mapping[str, Path] | None = None, *, headers_only: bool = False, progress: Progress = SILENT
) -> Inspection:
    """Look into a base and its fine-tunes.

    Args:
        base: checkpoint folder.
        tuned: folders by name.
        headers_only: don't read weights; imports no torch.
        progress: where to report.

    Raises:
        UsageError: a folder is not a readable checkpoint, or shares nothing with the base.
        KtmergeError: weights cannot be read.
    """
    reference = Checkpoint.open(base)
    parts = Parts(reference)
    found = Inspection(_contents(reference, parts))
    others = {name: Checkpoint.open(path) for name, path in (tuned or {}).items()}
    alignments = {name: align(reference, other, name) for name, other in others.items()}
    for name, other in others.items():
        if not alignments[name].mapping:
            raise UsageError(f"{name}: shares no tensor with the base; it is another architecture.")
        found.differences[name] = list(_differences(reference, other, alignments[name]))
    if others and not headers_only:
        _measure(reference, parts, others, alignments, found, progress)
        found.warnings += _warnings(found)
    return found


def _contents(checkpoint: Checkpoint, parts: Parts) -> dict[str, dict[str, Any]]:
    contents: dict[str, dict[str, Any]] = {}
    for name, info in checkpoint.tensors.items():
        empty = {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": []}
        entry = contents.setdefault(_stack(parts, name), empty)
        entry["tensors"] += 1
        entry["parameters"] += info.numel
        entry["bytes"] += info.nbytes
        if info.dtype not in entry["dtypes"]:
            entry["dtypes"].append(info.dtype)
    return contents


def _stack(parts: Parts, name: str) -> str:
    return parts.of(name).partition("[")[0]


def _differences(base: Checkpoint, other: Checkpoint, alignment: Alignment) -> Iterator[str]:
    listed = {
        "tensors missing": alignment.missing,
        "tensors the base lacks": alignment.extra,
        "tensors of another shape": tuple(str(one) for one in alignment.mismatched),
        "tensors under other names": tuple(f"{there} is {here}" for here, there in alignment.renamed.items()),
    }
    for what, names in listed.items():
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            yield f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"
    here, there = dict(_flat(base.config)), dict(_flat(other.config))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            yield f"config {key}: {here.get(key, 'absent')} in the base, {there.get(key, 'absent')} here"
    for file in sorted(set(base.other_files) & set(other.other_files) - {"config.json", "README.md"}):
        if not filecmp.cmp(base.root / file, other.root / file, shallow=False):
            yield f"file {file}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _IGNORED:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _measure(
    base: Checkpoint,
    parts: Parts,
    others: Mapping[str, Checkpoint],
    alignments: Mapping[str, Alignment],
    found: Inspection,
    progress: Progress,
) -> None:
    import torch

    found.movements = {name: {} for name in others}
    found.pairs = {pair: {} for pair in combinations(others, 2)}
    readers = {name: other.reader() for name, other in others.items()}
    names = [n for n, i in base.tensors.items() if tensor_class(n, i, base.config) not in ("buffer", "quant")]
    total = sum(base.tensors[name].nbytes for name in names)
    with torch.inference_mode(), base.reader() as own, progress.task("inspect", total, "bytes") as step:
        try:
            for name in names:
                sources = {one: a.mapping[name] for one, a in alignments.items() if name in a.mapping}
                for start in range(0, base.tensors[name].numel, CHUNK):
                    stop = min(start + CHUNK, base.tensors[name].numel)
                    theta = own.read(name, start, stop).float()
                    deltas = {
                        one: readers[one].read(there, start, stop).float() - theta for one, there in sources.items()
                    }
                    _count(found, _stack(parts, name), theta, deltas)
                step.advance(base.tensors[name].nbytes)
        finally:
            for reader in readers.values():
                reader.close()


def _count(found: Inspection, part: str, theta: Tensor, deltas: Mapping[str, Tensor]) -> None:
    """Add one piece to the sums."""
    import torch

    squares = {name: float(torch.dot(delta, delta)) for name, delta in deltas.items()}
    norm = float(torch.dot(theta, theta))
    for name, delta in deltas.items():
        moved = found.movements[name].setdefault(part, Movement())
        moved.base += norm
        moved.delta += squares[name]
        moved.elements += delta.numel()
        moved.changed += int(torch.count_nonzero(delta))
    for (first, second), by_part in found.pairs.items():
        if first in deltas and second in deltas:
            pair = by_part.setdefault(part, Pair())
            pair.dot += float(torch.dot(deltas[first], deltas[second]))
            pair.first += squares[first]
            pair.second += squares[second]
            signs = torch.sign(deltas[first]) * torch.sign(deltas[second])
            pair.both += int(torch.count_nonzero(signs))
            pair.opposed += int((signs < 0).sum())


def _warnings(found: Inspection) -> Iterator[str]:
    far = {name for name, parts in found.movements.items() if _total(parts) > _FAR}
    for name in sorted(far):
        yield (
            f"{name} moved by {_total(found.movements[name]):.0%} of the base's norm: it was probably tuned from "
            "another base, or trained much further; its blend may be useless."
        )
    for (first, second), parts in found.pairs.items():
        total = Pair(*(sum(getattr(pair, key) for pair in parts.values()) for key in Pair.__dataclass_fields__))
        if total.cosine is not None and total.cosine > _ALIKE:
            reason = (
                "they share a base that is not this one"
                if {first, second} & far
                else "they learned the same; average them (method: linear)"
            )
            yield f"{first} and {second} moved in the same direction (cosine {total.cosine:.2f}): {reason}."
    for name, movements in found.movements.items():
        if not any(movement.changed for movement in movements.values()):
            yield f"{name} equals the base everywhere."


def _total(parts: Mapping[str, Movement]) -> float:
    base = math.fsum(movement.base for movement in parts.values())
    return Movement(base, math.fsum(movement.delta for movement in parts.values())).relative


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
