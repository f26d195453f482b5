"""What is scored: a checkpoint, by itself or with an adapter attached that cannot be, or is not, folded into it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.adapter import CONFIG, WEIGHTS, is_adapter
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.files import file_digest
from ktmerge.errors import UsageError
from ktmerge.eval.loading import load_model
from ktmerge.progress import Progress

if TYPE_CHECKING:
    import torch

Reference = Path | tuple[Path, Path]
"""A folder with a checkpoint, or with an adapter for the base; or the folders of a model and of an adapter for it."""


@dataclass(frozen=True)
class Subject:
    """A model as it is scored.

    Attributes:
        checkpoint: has weights and tokenizer.
        adapter: the folder of what is attached to them.
    """

    checkpoint: Checkpoint
    adapter: Path | None = None

    @property
    def path(self) -> str:
        """How to call it."""
        return str(self.checkpoint.root) + (f"+{self.adapter}" if self.adapter is not None else "")

    def digest(self, progress: Progress) -> str:
        """sha256 of all that it computes with."""
        own = self.checkpoint.content_digest(progress)
        if self.adapter is None:
            return own
        files = sorted([*self.adapter.rglob(CONFIG), *self.adapter.rglob(WEIGHTS)])
        return hashlib.sha256("\n".join([own, *map(file_digest, files)]).encode()).hexdigest()

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model in memory, ready to be asked.

        Raises:
            UsageError: transformers or PEFT cannot load it, or the adapter is of another model.
            KtmergeError: it does not fit into the device's memory.
        """
        model = load_model(self.checkpoint.root, device, dtype)
        if self.adapter is None:
            return model
        from ktmerge.adapters.saved import attach_saved

        return attach_saved(model, self.adapter).to(device)


def subject(reference: Reference, base: Reference) -> Subject:
    """What a reference means, beside the base of a run.

    Raises:
        UsageError: it is neither a checkpoint nor an adapter, or cannot be scored.
    """
    if isinstance(reference, tuple):
        return Subject(_opened(reference[0]), reference[1])
    if not is_adapter(Path(reference)):
        return Subject(_opened(Path(reference)))
    if reference == base:
        raise UsageError(f"{reference}: is an adapter, which cannot be the base; give the model it was trained on.")
    below = subject(base, base)
    if below.adapter is not None:
        raise UsageError(f"{reference}: is an adapter, and the base has one already; give it as model+adapter.")
    return Subject(below.checkpoint, Path(reference))


def _opened(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    if checkpoint.config.get("is_encoder_decoder"):
        kind = checkpoint.config.get("model_type", "unknown")
        raise UsageError(
            f"{folder}: is an encoder-decoder ({kind}); only models that go on with a text are scored here. Score it "
            "elsewhere, and join the results with 'ktmerge eval import'."
        )
    return checkpoint
