"""Whether what is trained has a part in the loss at all: texts without images pass a vision tower by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError
from ktmerge.progress import Progress
from ktmerge.tuners.collate import Collator
from ktmerge.tuners.encode import Encoded, Encoder
from ktmerge.tuners.loss import for_model
from ktmerge.tuners.mode import evaluating

if TYPE_CHECKING:
    import torch


def require_reach(model: Any, encoder: Encoder, samples: Sequence[Encoded], what: str, progress: Progress) -> None:
    """Try the shortest sample with images and the shortest without: one of them must reach something that is trained.

    ``what`` is what is trained, as the job has it.

    Raises:
        UsageError: none does, so that nothing would be learned.
    """
    kinds = {seeing: [one for one in samples if bool(one.images) is seeing] for seeing in (True, False)}
    reached = {seeing: _reaches(model, encoder, min(members, key=len)) for seeing, members in kinds.items() if members}
    if not any(reached.values()):
        why = "the model makes no use of it" if True in reached else "the data has no images, and texts pass it by"
        raise UsageError(f"{what}: nothing that is trained has a part in the loss: {why}.")
    if not all(reached.values()):
        passing = len(kinds[not reached[True]])
        told = "without images" if reached[True] else "with images"
        progress.note(f"{passing} of {len(samples)} samples, those {told}, teach nothing to what is trained ({what}).")


def with_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself, or, of a batch that nothing trained has a part in, one that leaves all gradients unset."""
    return loss if loss.requires_grad else loss.detach().requires_grad_()


def _reaches(model: Any, encoder: Encoder, sample: Encoded) -> bool:
    batch = for_model(Collator(0, extras=encoder.extras)([sample]))
    with evaluating(model):
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).logits
    return bool(logits.requires_grad)
