"""A job as the Trainer's arguments, and its length in steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.machine import Machine
from ktmerge.tuners.optimizers import KINDS
from ktmerge.tuners.processes import Processes, passes_of


def training_arguments(
    job: FinetuneJob, machine: Machine, processes: Processes, total: int, folder: Path, *, evaluate_first: bool
) -> Any:
    """What the Trainer is told; when to log, evaluate and save is not its business.

    Args:
        job: what was asked for.
        machine: device and number format.
        processes: all that take part, which share a step's samples.
        total: steps of the whole run.
        folder: where its checkpoints go.
        evaluate_first: whether losses are measured before the first step.
    """
    from transformers import TrainingArguments

    size, passes = passes_of(job.batch_size, job.gradient_accumulation, processes.count)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=passes,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.scheduler,
        warmup_steps=warmup_steps(job, total),
        weight_decay=job.weight_decay,
        max_grad_norm=math.inf if job.max_grad_norm is None else job.max_grad_norm,
        optim=KINDS[job.optimizer].name,
        seed=job.seed,
        data_seed=job.seed,
        bf16=machine.precision == "bfloat16",
        use_cpu=machine.device == "cpu",
        # what is due after a step is decided by RhythmCallback
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        eval_on_start=evaluate_first,
        save_total_limit=2,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        # otherwise every process would hold whole gradients while it accumulates
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": processes.is_several}},
    )
    # of several devices the Trainer would make a torch.nn.DataParallel, which is slower than one of them
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def total_steps(job: FinetuneJob, samples: int) -> int:
    """Optimizer steps of a job on so many samples."""
    an_epoch = math.ceil(math.ceil(samples / (job.batch_size - job.replayed)) / job.gradient_accumulation)
    return job.max_steps or max(1, math.ceil(job.epochs * an_epoch))


def warmup_steps(job: FinetuneJob, total: int) -> int:
    """Steps over which the rate rises; the first of them has rate 0, so that one step at least remains."""
    return min(total - 1, round(total * job.warmup) if job.warmup < 1 else int(job.warmup))
