"""Where ktmerge keeps what it can make again: converted models, downloads."""

from __future__ import annotations

import os
from pathlib import Path

from ktmerge.errors import UsageError


def cache_folder() -> Path:
    """``$KTMERGE_CACHE``, else ``$XDG_CACHE_HOME/ktmerge``, else ``~/.cache/ktmerge``; it need not exist yet.

    Raises:
        UsageError: nobody can tell where home is, as in a container that runs as a user without a name.
    """
    try:
        if own := os.environ.get("KTMERGE_CACHE"):
            return Path(own).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ktmerge"
    except RuntimeError:
        raise UsageError("this user has no home folder; set HOME, or KTMERGE_CACHE to a folder.") from None
