"""What a blend did, in numbers: how far each part moved, how much of it survived rounding. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TensorReport:
    """What happened to one tensor. Norms are Frobenius.

    Attributes:
        what: the method, or ``keep base`` / ``keep <expert>``.
        intended: sum of squares of lambda M.
        base: sum of squares of theta_0.
        along: inner product of what was stored (output minus theta_0, after rounding) with lambda M.
        changed: number of elements whose stored value differs from theta_0.
        kept: per expert, number of non-zero elements after the transforms.
        broken: number of elements that are not finite in an input and so keep the base's value.
    """

    name: str
    part: str
    what: str
    elements: int
    intended: float = 0.0
    base: float = 0.0
    along: float = 0.0
    changed: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    broken: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "part": self.part, "what": self.what, **summary([self])}


@dataclass
class BlendReport:
    """What a blend did.

    Attributes:
        recipe: its name.
        tensors: in file order; empty if the blend was not measured.
        seconds: wall time.
        read: bytes of base and experts.
        written: bytes of weights.
        notes: what a person should know.
        out: sha256 of each weight file, by file; empty for a blend into a live model.
        beside: sha256 of each file beside the weights, by file: index, config, whatever the base carries, and the
            lock; not card and record.
        recorded: the parts as ``ktmerge.json`` has them, of an output that was there already; then nothing was read.
    """

    recipe: str
    tensors: list[TensorReport]
    seconds: float = 0.0
    read: int = 0
    written: int = 0
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)
    out: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    recorded: list[dict[str, Any]] | None = None

    def parts(self) -> list[dict[str, Any]]:
        """One summary for each part (all layers of a stack together) and treatment."""
        if self.recorded is not None:
            return self.recorded
        groups: dict[tuple[str, str], list[TensorReport]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.part.partition("[")[0], tensor.what), []).append(tensor)
        return [{"part": part, "what": what, **summary(group)} for (part, what), group in groups.items()]

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Columns, rows and title."""
        columns = ["part", "what", "tensors", "moved by", "stored", "changed", "kept of each expert"]
        rows = [
            [
                row["part"],
                row["what"],
                str(row["tensors"]),
                _percent(row["relative_norm"]),
                _percent(row["realised"]),
                _percent(row["changed"]),
                ", ".join(f"{name} {_percent(share)}" for name, share in row["density"].items()),
            ]
            for row in self.parts()
        ]
        if self.recorded is not None:
            return columns, rows, f"{self.recipe}: was there already"
        title = f"{self.recipe}: {self.written / 1e6:.0f} MB in {self.seconds:.1f} s on {self.device}"
        return columns, rows, title

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "seconds": round(self.seconds, 3),
            "bytes_read": self.read,
            "bytes_written": self.written,
            "device": self.device,
            "notes": self.notes,
            "output": self.out,
            "parts": self.parts(),
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


def summary(tensors: Iterable[TensorReport]) -> dict[str, Any]:
    """Totals over some tensors.

    ``relative_norm`` is ||lambda M|| / ||theta_0||; ``realised`` the share of lambda M that the stored values show
    after rounding (1 is all of it); ``changed`` and ``density`` are shares of the elements; None: nothing was blended.
    """
    group = list(tensors)
    blended = [tensor for tensor in group if not tensor.what.startswith("keep ")]
    elements = sum(tensor.elements for tensor in blended)
    intended = math.fsum(tensor.intended for tensor in blended)
    base = math.fsum(tensor.base for tensor in blended)
    along = math.fsum(tensor.along for tensor in blended)
    return {
        "tensors": len(group),
        "elements": sum(tensor.elements for tensor in group),
        "norm": _round(math.sqrt(intended)) if blended else None,
        "relative_norm": _round(math.sqrt(intended / base)) if base else None,
        "realised": _round(along / intended) if intended else None,
        "changed": _round(sum(tensor.changed for tensor in blended) / elements) if elements else None,
        "density": {name: _round(count / elements) for name, count in _total_kept(blended).items() if elements},
    }


FAR = 0.1
"""||lambda M|| / ||theta_0|| above which experts probably come from another base."""


def cautions(tensors: Iterable[TensorReport]) -> list[str]:
    """What a blend's numbers say of its inputs: experts of another base, or that are the base. One sentence each."""
    blended = [tensor for tensor in tensors if not tensor.what.startswith("keep ")]
    moved = summary(blended)["relative_norm"]
    if blended and not any(tensor.changed for tensor in blended):
        return ["no weight differs from the base's: are experts and base other models, and lambda and density over 0?"]
    idle = [name for name, count in _total_kept(blended).items() if not count]
    found = [f"{name} adds nothing: it equals the base, or all of its change was dropped." for name in idle]
    if moved is not None and moved > FAR:
        found.append(
            f"the blend lies {moved:.0%} of the base's norm away from it, which is far: an expert may have been tuned "
            "from another base; 'ktmerge inspect BASE EXPERT' tells."
        )
    return found


def _total_kept(tensors: Iterable[TensorReport]) -> Mapping[str, int]:
    totals: dict[str, int] = {}
    for tensor in tensors:
        for name, count in tensor.kept.items():
            totals[name] = totals.get(name, 0) + count
    return totals


def _round(value: float) -> float:
    """Four digits: sums of squares depend on the device in the last of seven."""
    return float(f"{value:.4g}")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
