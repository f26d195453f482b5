"""What is said before the first step: how long, of what, with how much memory and disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.progress import Progress
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.estimate import estimate
from ktmerge.tuners.machine import Machine, less_memory, memory_available, state_bytes
from ktmerge.tuners.partial import Saved
from ktmerge.tuners.processes import Processes, passes_of
from ktmerge.tuners.trained import Trained


def announce(
    job: FinetuneJob,
    base: Checkpoint,
    machine: Machine,
    processes: Processes,
    trained: Trained,
    progress: Progress,
    *,
    name: str,
    total: int,
    longest: int,
    saved: Saved | None,
) -> None:
    """Tell of a run that is about to begin.

    Args:
        job: what was asked for.
        base: that is trained.
        machine: where.
        processes: all that take part.
        trained: what of the base moves.
        progress: where to tell it.
        name: what the expert is called.
        total: steps of the whole run.
        longest: tokens of the longest sample.
        saved: the state it goes on from.
    """
    samples = job.batch_size * job.gradient_accumulation
    start = f"going on after step {saved.step} of" if saved else "training"
    progress.note(f"{name}: {start} {total} steps of {samples} samples, on {machine.name}, {machine.precision}.")
    if processes.is_several:
        size, passes = passes_of(job.batch_size, job.gradient_accumulation, processes.count)
        progress.note(f"sharded over {processes.count} processes (FSDP2), each with {size} x {passes} samples a step.")
    if job.replay:
        progress.note(f"replay: {job.replayed} of the {job.batch_size} samples of every batch.")
    for line in trained.lines(state_bytes(job)):
        progress.note(line)
    for asked, other in trained.shared:
        progress.note(f"{asked} and {other} share one tensor in this model: training one trains both.")
    needed = estimate(job, base, processes.count, device=machine.device, longest=longest).total
    free = memory_available(machine.device)
    if needed > free:
        progress.note(
            f"this may not fit into memory: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. "
            f"{less_memory(job, longest, machine.device)}"
        )


def warn_of_disk(folder: Path, parameters: int, progress: Progress, *, saves: bool) -> None:
    """Say so if the disk may run full.

    Args:
        folder: that is written to.
        parameters: that are trained.
        progress: where to tell it.
        saves: whether states are saved on the way.
    """
    # the result twice, under the Trainer's names and the base's, and up to three checkpoints with moments
    needed = parameters * (8 + (36 if saves else 0))
    free = shutil.disk_usage(folder).free
    if needed > free:
        progress.note(f"the disk may run full: up to {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free.")
