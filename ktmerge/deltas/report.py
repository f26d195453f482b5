"""How large a delta is, and how near to the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.deltas.manifest import BLOBS, FILE, Manifest


@dataclass(frozen=True)
class DeltaReport:
    """A delta in numbers.

    Attributes:
        out: its folder, or that of the model made from it.
        manifest: what it says of itself.
        size: bytes of the delta.
        full: bytes of the model's weights.
    """

    out: Path
    manifest: Manifest
    size: int
    full: int

    @classmethod
    def of(cls, delta: Path, manifest: Manifest, out: Path | None = None) -> DeltaReport:
        """Of the delta in a folder; ``out``: what was made from it."""
        size = sum((delta / file).stat().st_size for file in (FILE, BLOBS))
        return cls(out or delta, manifest, size, sum(size for size, _ in manifest.files.values()))

    @property
    def error(self) -> float:
        """The largest relative error of a tensor's change."""
        return max((tensor.error for tensor in self.manifest.tensors.values()), default=0.0)

    def codings(self) -> dict[str, int]:
        """Number of tensors by how most of their elements are coded."""
        counts: dict[str, int] = {}
        for tensor in self.manifest.tensors.values():
            by_kind: dict[str, int] = {}
            for piece in tensor.pieces:
                kind = piece.coding.partition(":")[0]
                by_kind[kind] = by_kind.get(kind, 0) + piece.count
            kind = max(by_kind, key=lambda one: by_kind[one]) if by_kind else "equal"
            counts[kind] = counts.get(kind, 0) + 1
        return dict(sorted(counts.items()))

    def pairs(self) -> dict[str, str]:
        """The main facts as text, for a terminal."""
        percent = 100 * self.size / self.full if self.full else 0.0
        share = f"{percent:{'.0f' if percent >= 10 else '.2g'}} % of the weights' {self.full / 1e6:.2f} MB"
        kept = "exact: the same bytes" if self.manifest.exact else f"within {100 * self.error:.3g} % of each change"
        return {
            "written": str(self.out),
            "size": f"{self.size / 1e6:.2f} MB, {share}",
            "tensors": ", ".join(f"{count} {kind}" for kind, count in self.codings().items()),
            "error": kept,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "bytes": self.size,
            "weights_bytes": self.full,
            "ratio": self.size / self.full if self.full else None,
            "exact": self.manifest.exact,
            "largest_error": self.error,
            "tensors": self.codings(),
        }
