"""Where ktmerge keeps what it can make again: converted models, downloads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$KTMERGE_CACHE``, else ``$XDG_CACHE_HOME/ktmerge``, else ``~/.cache/ktmerge``; it need not exist yet."""
    if own := os.environ.get("KTMERGE_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ktmerge"
