"""The end of a run: which weights are its result, the last ones, an average, or those a guard went back to.

Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktmerge.progress import Progress
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.keeping.average import averaged
from ktmerge.tuners.keeping.keeping import Keeping
from ktmerge.tuners.model import trained_state
from ktmerge.tuners.partial import Partial
from ktmerge.tuners.sharding import is_writer, put_together
from ktmerge.tuners.trainer import AnswerTrainer


def save_weights(
    trainer: AnswerTrainer,
    keeping: Keeping,
    job: FinetuneJob,
    partial: Partial,
    progress: Progress,
    save: Callable[[Any, Path], None] | None = None,
) -> dict[str, Any]:
    """Write what was trained, under transformers' names for files, into ``partial.final``; if asked ``partial.last``.

    Args:
        trainer: done.
        keeping: what was asked for beside it.
        job: what was asked for.
        partial: the working folder.
        progress: told the losses of an average.
        save: writes a model another way, into a folder; once, it may change the model.

    Returns:
        what is to be told of it: the step a guard went back to, losses of an average.
    """
    model: Any = trainer.model
    save = save or _save
    if keeping.average is None:
        save(model, partial.final)
        guard = keeping.guard
        if guard is None or not guard.stopped:
            return {}
        return {"stopped_at": int(trainer.state.global_step), "result_of_step": guard.step}
    with averaged(keeping.parameters, keeping.average):
        losses = trainer.losses()
        if job.export != "last":
            save(model, partial.final)
    if job.export != "average":
        save(model, partial.last if job.export == "both" else partial.final)
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    if shown:
        progress.note(f"averaged weights ({job.average}): loss {shown}")
    return {"average": {"kind": job.average, "losses": losses}}


def _save(model: Any, folder: Path) -> None:
    state = put_together(trained_state(model))
    if is_writer():
        model.save_pretrained(folder, state_dict=state)
