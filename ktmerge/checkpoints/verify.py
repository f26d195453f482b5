"""Whether a checkpoint is what it should be: its headers as planned, and whole for transformers to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.layout import read_config
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.errors import KtmergeError, UsageError

_SHOWN = 5
_KINDS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}


@dataclass(frozen=True)
class Loadable:
    """What was found: ``loads``, or ``unknown`` with the reason why nothing could be said."""

    status: Literal["loads", "unknown"]
    detail: str


def verify_loadable(path: Path) -> Loadable:
    """Load the checkpoint ``path`` on the meta device (no memory for weights) and look for loose ends.

    No code from the checkpoint is run: an architecture that transformers doesn't have is reported as unknown.

    Raises:
        KtmergeError: transformers finds missing, unexpected or mismatched tensors, or refuses the checkpoint.
    """
    config = read_config(path)
    architecture = next(iter(config.get("architectures") or []), None)
    if not isinstance(architecture, str):
        return Loadable("unknown", "config.json names no architecture")
    import transformers

    model_class: Any = getattr(transformers, architecture, None)
    if not hasattr(model_class, "from_pretrained"):
        return Loadable("unknown", f"transformers {transformers.__version__} has no {architecture}")
    try:
        with quiet_transformers():
            # ignore_mismatched_sizes: so that wrong shapes are listed like the rest
            _, info = model_class.from_pretrained(
                path,
                device_map="meta",
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        raise KtmergeError(f"{path}: transformers cannot load it as {architecture}: {error}") from error
    troubles = [
        f"{len(info[kind])} {word} ({', '.join(sorted(map(_name, info[kind]))[:_SHOWN])})"
        for kind, word in _KINDS.items()
        if info.get(kind)
    ]
    if troubles:
        raise KtmergeError(f"{path}: does not load whole as {architecture}: {'; '.join(troubles)}.")
    return Loadable("loads", f"{architecture} under transformers {transformers.__version__}")


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


def _name(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple) else key)
