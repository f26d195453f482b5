"""The nearest valid name, for every message that refuses an invalid one."""

from __future__ import annotations

from ktmerge.errors import did_you_mean

__all__ = ["did_you_mean"]
