"""base + tuned + recipe -> blended. Importing this loads no torch; calling its functions does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktmerge.merge.blending import blend, blend_into
    from ktmerge.merge.diagnostics.inspecting import inspect
    from ktmerge.merge.report import BlendReport

__all__ = ["BlendReport", "blend", "blend_into", "inspect"]

_PLACES = {"BlendReport": "report", "blend": "blending", "blend_into": "blending", "inspect": "diagnostics.inspecting"}


def __getattr__(name: str) -> Any:
    """Load what is asked for: whoever only plans needs none of it."""
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
