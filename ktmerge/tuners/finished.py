"""Whether a finished output is what a job asks for, and still what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.digests import digest_of
from ktmerge.errors import UsageError
from ktmerge.tuners.partial import differences


def is_finished(
    out: Path, made: Mapping[str, Any], inputs: Mapping[str, Any], files: Mapping[str, str], *, overwrite: bool
) -> bool:
    """Whether ``out`` may stay as it is; False if it is to be replaced.

    Args:
        out: the output, with a record.
        made: the inputs that its record names.
        inputs: those of the job.
        files: sha256 of its weights by file, as its record has them.
        overwrite: whether it may be replaced.

    Raises:
        UsageError: it may not, and was made from other inputs, or is not what was written.
        KtmergeError: it cannot be read.
    """
    changed = differences(made, inputs)
    if changed:
        problem = f"exists and was made with other settings: {'; '.join(changed)}. Choose another folder, or"
    elif damage := _damage(out, files):
        problem = f"was made by this very job, but its {damage}; put back what was written, or"
    else:
        return True
    if overwrite:
        return False
    raise UsageError(f"{out}: {problem} add --overwrite.")


def _damage(out: Path, files: Mapping[str, str]) -> str:
    """Which file is no longer what was written, in words; empty if all are."""
    for file, digest in files.items():
        if not (out / file).is_file():
            return f"{file} is missing"
        if digest_of(out / file).sha256 != digest:
            return f"{file} has been changed or cut off since"
    return ""
