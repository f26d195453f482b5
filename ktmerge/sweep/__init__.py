"""Search over recipes: blends in place on one loaded model, scored, raced, chosen on some items, reported on others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktmerge.sweep.outcome import Outcome
    from ktmerge.sweep.settings import SweepSettings
    from ktmerge.sweep.space import Range, Space
    from ktmerge.sweep.worker import search

__all__ = ["Outcome", "Range", "Space", "SweepSettings", "search"]

_HOME = {"Outcome": "outcome", "Range": "space", "Space": "space", "SweepSettings": "settings", "search": "worker"}


def __getattr__(name: str) -> Any:
    """Import a name's module on first use: naming a sweep needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'ktmerge.sweep' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"ktmerge.sweep.{_HOME[name]}"), name)
