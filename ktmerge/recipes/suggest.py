"""The nearest valid name, for every message that refuses an invalid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` or, with nothing near, `` Valid: a, b, c.``; empty if there is nothing valid."""
    names = sorted(valid)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Valid: {', '.join(names)}." if names else ""
