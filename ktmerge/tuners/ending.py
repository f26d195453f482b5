"""The end of a run: which weights are its result, the last ones, an average, or those a guard went back to.

Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

from typing import Any

from ktmerge.progress import Progress
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners.keeping.average import averaged
from ktmerge.tuners.keeping.keeping import Keeping
from ktmerge.tuners.model import trained_state
from ktmerge.tuners.partial import Partial
from ktmerge.tuners.trainer import AnswerTrainer


def save_weights(
    trainer: AnswerTrainer, keeping: Keeping, job: FinetuneJob, partial: Partial, progress: Progress
) -> dict[str, Any]:
    """Write what was trained, under transformers' names for files, into ``partial.final``; if asked ``partial.last``.

    Returns:
        what is to be told of it: the step a guard went back to, losses of an average.
    """
    model: Any = trainer.model
    if keeping.average is None:
        model.save_pretrained(partial.final, state_dict=trained_state(model))
        guard = keeping.guard
        if guard is None or not guard.stopped:
            return {}
        return {"stopped_at": int(trainer.state.global_step), "result_of_step": guard.step}
    if job.export != "average":
        last = partial.last if job.export == "both" else partial.final
        model.save_pretrained(last, state_dict=trained_state(model))
    with averaged(keeping.parameters, keeping.average):
        losses = trainer.losses()
        if job.export != "last":
            model.save_pretrained(partial.final, state_dict=trained_state(model))
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    if shown:
        progress.note(f"averaged weights ({job.average}): loss {shown}")
    return {"average": {"kind": job.average, "losses": losses}}
