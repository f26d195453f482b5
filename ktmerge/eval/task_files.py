"""Task files of lm_eval that a suite brings along: plain YAML is data, anything that would run code is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ktmerge.errors import UsageError

TRUST = "KTMERGE_TRUST_TASK_CODE"
_RUNS = re.compile(r"!function|!!python|^\s*-?\s*metric\s*:\s*['\"]?\S*(?:/|\.py)", re.MULTILINE)
_INCLUDES = re.compile(r"^\s*include\s*:\s*['\"]?([^\s'\"]+)", re.MULTILINE)


def refuse_code(folder: Path) -> None:
    """Refuse a folder whose task files name Python code, or include files from elsewhere, unless they are trusted.

    Raises:
        UsageError: it names the file, and how to trust it.
    """
    if os.environ.get(TRUST) == "1":
        return
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in (".py", ".pyc", ".jsonl", ".json", ".csv", ".parquet"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        elsewhere = [one for one in _INCLUDES.findall(text) if not _inside(path.parent / one, folder)]
        if _RUNS.search(text) or elsewhere:
            what = f"includes {elsewhere[0]}" if elsewhere else "names Python code"
            raise UsageError(f"{path} {what}, which would be run; if it is yours, set {TRUST}=1.")


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
