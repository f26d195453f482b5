"""Where ktmerge keeps what it can make again: converted models, downloads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$KTMERGE_CACHE``, else ``$XDG_CACHE_HOME/ktmerge``, else ``~/.cache/ktmerge``; it need not exist yet."""
    own = os.environ.get("KTMERGE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ktmerge"
