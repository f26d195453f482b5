"""base + tuned + recipe -> blended. Importing this loads no torch; calling its functions does."""

from __future__ import annotations

from ktmerge.merge.blending import blend, blend_into
from ktmerge.merge.diagnostics import inspect
from ktmerge.merge.report import BlendReport

__all__ = ["BlendReport", "blend", "blend_into", "inspect"]
