"""A checkpoint as what it is apart from its base: exact, or within a stated error."""

from ktmerge.deltas.apply import apply_delta
from ktmerge.deltas.export import export_delta
from ktmerge.deltas.manifest import Manifest
from ktmerge.deltas.report import DeltaReport

__all__ = ["DeltaReport", "Manifest", "apply_delta", "export_delta"]
