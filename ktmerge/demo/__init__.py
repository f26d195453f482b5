"""The embedded default: the whole job on a small real model, with data from packages. Importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktmerge.demo.demo import run_demo

__all__ = ["run_demo"]


def __getattr__(name: str) -> Any:
    """Import the demo on first use."""
    if name != "run_demo":
        raise AttributeError(f"module 'ktmerge.demo' has no attribute '{name}'")
    from ktmerge.demo.demo import run_demo

    return run_demo
