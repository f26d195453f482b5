"""What is in a checkpoint, and how far tuned models moved from it: to look at before blending.

Headers alone need neither numpy nor numba; the rest is one streaming pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktmerge.merge.diagnostics.inspecting import inspect
    from ktmerge.merge.diagnostics.inspection import Inspection
    from ktmerge.merge.diagnostics.picture import heat_map, require_drawable

__all__ = ["Inspection", "heat_map", "inspect", "require_drawable"]

_HOME = {
    "Inspection": "inspection", "heat_map": "picture", "inspect": "inspecting", "require_drawable": "picture",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a name's module on first use: methods ask only what kind a tensor is of."""
    if name not in _HOME:
        raise AttributeError(f"module 'ktmerge.merge.diagnostics' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"ktmerge.merge.diagnostics.{_HOME[name]}"), name)
