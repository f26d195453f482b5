"""Whether the headers of a checkpoint are as planned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.errors import KtmergeError, UsageError


def verify_headers(folder: Path, shown: Path, planned: Mapping[str, TensorInfo]) -> None:
    """Read the headers in ``folder`` back from the disk and hold them against the plan.

    Raises:
        KtmergeError: they differ, or cannot be read; ``shown`` is the folder's name in the message.
    """
    try:
        found = Checkpoint.open(folder).tensors
    except UsageError as error:
        raise KtmergeError(f"{shown}: what was written does not read back: {error}") from None
    wrong = sorted(name for name in {*found, *planned} if found.get(name) != planned.get(name))
    if wrong:
        raise KtmergeError(f"{shown}: the written header differs from the plan at '{wrong[0]}'.")
