"""The training itself: from a base, or a saved state, to trained weights in the working folder."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from time import monotonic
from traceback import clear_frames
from typing import TYPE_CHECKING

from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.tuners.assembly import Assembly, assemble
from ktmerge.tuners.assignment import Assignment
from ktmerge.tuners.failures import explaining
from ktmerge.tuners.machine import deterministic, is_out_of_memory
from ktmerge.tuners.partial import Saved
from ktmerge.tuners.result import seal

if TYPE_CHECKING:
    from ktmerge.tuners.trainer import AnswerTrainer


def train(given: Assignment, saved: Saved | None) -> None:
    """Train to the end and seal the result.

    Args:
        given: what is to be done.
        saved: the state to go on from.

    Raises:
        KtmergeError: out of memory, a full disk, a loss that is no number.
        KeyboardInterrupt: asked to stop; the state is saved first.
    """
    from ktmerge.tuners.callbacks import Interruption

    given = _on_this_machine(given)
    started, earlier = monotonic(), saved.seconds if saved else 0.0
    with (
        explaining(
            given.job, given.partial, given.processes, given.encoded["train"].longest, given.machine.device
        ),
        quiet_transformers(),
        _without_warnings(),
        deterministic(given.machine.device),
        Interruption(given.progress) as asked,
        given.progress.task(f"fine-tuning {given.name}", given.total, "steps") as bar,
    ):  # fmt: skip
        bar.advance(saved.step if saved else 0)
        made = assemble(given, saved, asked, bar, lambda: earlier + monotonic() - started)
        _fit(given, made.trainer, saved)
        step = int(made.trainer.state.global_step)
        if _has_gone_back(given, made, step) or step >= given.total:
            seal(given, made, earlier + monotonic() - started)
        del made  # its memory is wanted for the export
        gc.collect()
    if asked.requested:
        given.progress.note(f"stopped after step {step} of {given.total}; go on with --resume.")
        raise KeyboardInterrupt


def _on_this_machine(given: Assignment) -> Assignment:
    if not given.job.offload_optimizer or given.machine.device != "cpu":
        return given
    given.progress.note("offload_optimizer: without a CUDA device everything is in the host's memory already.")
    return replace(given, job=given.job.model_copy(update={"offload_optimizer": False}))


def _has_gone_back(given: Assignment, made: Assembly, step: int) -> bool:
    """Whether the guard stopped the run; the weights are then those of the last evaluation that it let pass."""
    guard = made.keeping.guard
    if guard is None or not guard.stopped:
        return False
    guard.restore()
    given.progress.note(
        f"stopped at step {step}: the upstream loss is above {guard.limit:.4f}; "
        f"the result is that of step {guard.step}."
    )
    return True


def _fit(given: Assignment, trainer: AnswerTrainer, saved: Saved | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(saved.path) if saved else None)
    except KeyboardInterrupt:
        if given.partial.has_state:
            given.progress.note("stopped at once; go on from the last saved step with --resume.")
        raise
    except Exception as error:
        if is_out_of_memory(error):
            _save_what_is_done(given, trainer, error)
        raise


def _save_what_is_done(given: Assignment, trainer: AnswerTrainer, error: Exception) -> None:
    """Memory ran out: free what the failed step holds, and save the state before it."""
    clear_frames(error.__traceback__)
    gc.collect()
    with suppress(Exception):  # the error that is told is the first one
        trainer.save_last_step()
    newest = given.partial.newest()
    if newest is not None:
        given.progress.note(f"kept the state after step {newest.step} of {given.total}; go on with --resume.")


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
