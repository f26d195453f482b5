"""Score files on their way to others, and from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.regular import once
from ktmerge.errors import UsageError
from ktmerge.merge.record import portable


def portable_scores(path: Path) -> str:
    """A score file whose models are called by no path of this machine; otherwise as it is.

    Raises:
        UsageError: it is none, or cannot be read.
    """
    from ktmerge.eval.results import Results

    Results.load(path)
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    told = json.loads(text)
    for model in told["models"].values():
        model["path"] = portable(str(model["path"]))
    return text if told == document else json.dumps(told, ensure_ascii=False) + "\n"


def require_scores(raw: bytes, where: str) -> None:
    """Refuse what is no score file.

    Raises:
        UsageError: likewise.
    """
    try:
        document: Any = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{where}: is no JSON, or has a key twice; a bundle holds score files of 'ktmerge eval' there."
        ) from None
    if not isinstance(document, dict) or "ktmerge_eval" not in document:
        raise UsageError(f"{where}: is no score file of 'ktmerge eval'.")
