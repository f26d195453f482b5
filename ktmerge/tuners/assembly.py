"""From an assignment to a Trainer that is ready to go: the model, what moves of it, what listens and what is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.progress import Step
from ktmerge.tuners.announcement import announce, warn_of_disk
from ktmerge.tuners.arguments import training_arguments
from ktmerge.tuners.assignment import Assignment
from ktmerge.tuners.images.agreement import require_agreement
from ktmerge.tuners.loss import projects_faithfully
from ktmerge.tuners.material import room_of
from ktmerge.tuners.model import load_model
from ktmerge.tuners.order import by_curriculum, by_length
from ktmerge.tuners.partial import Saved
from ktmerge.tuners.reach import require_reach
from ktmerge.tuners.trained import Trained, choose_trained

if TYPE_CHECKING:
    from ktmerge.tuners.adapters.attach import Adapted
    from ktmerge.tuners.board import BoardCallback
    from ktmerge.tuners.callbacks import Interruption
    from ktmerge.tuners.keeping.keeping import Keeping
    from ktmerge.tuners.packing import LengthSampler
    from ktmerge.tuners.selection.selection import Selection
    from ktmerge.tuners.trainer import AnswerTrainer


@dataclass(frozen=True)
class Assembly:
    """A Trainer, and what it was made of.

    Attributes:
        trained: the parameters that move.
        keeping: what keeps the base.
        selection: which elements move; None: all.
        adapted: what is trained in place of the weights, if anything.
        board: writes event files.
    """

    trainer: AnswerTrainer
    trained: Trained
    keeping: Keeping
    selection: Selection | None
    adapted: Adapted | None
    board: BoardCallback | None


def assemble(
    given: Assignment, saved: Saved | None, asked: Interruption, bar: Step, seconds: Callable[[], float]
) -> Assembly:
    """Load the base and put everything together, to the state before the first step.

    Args:
        given: what is to be done.
        saved: the state it will go on from.
        asked: whether to stop.
        bar: told of steps.
        seconds: that the run has taken, of all its parts.

    Raises:
        UsageError: the job does not fit the model, or the data do not.
    """
    from transformers import PrinterCallback, set_seed

    from ktmerge.tuners.keeping.keeping import Keeping

    job, processes = given.job, given.processes
    set_seed(job.seed)
    model: Any = load_model(given.base, given.progress, sees="vision_config" in given.base.config)
    if not processes.is_several:
        model.to(given.machine.device)  # before anything is copied of it
    staged = by_curriculum(given, model)  # an untrained adapter need not be the base
    adapted = _attach(given, model)
    trained = choose_trained(model, given.base, job) if adapted is None else adapted.trained
    model = model if adapted is None else adapted.model
    _look(given, model, trained, saved)
    if job.activation_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    lean = projects_faithfully(model, model.config.get_text_config().vocab_size)
    _require_packable(given, model, lean=lean)
    if processes.is_several:
        _shard(given, model, lean=lean)
    selection = _select(given, model, trained)
    keeping = Keeping.of(
        job, given.base, model, lean=lean, total=given.total, fisher=given.fisher,
        samples=(len(given.samples), len(given.replayed)),
    )  # fmt: skip
    lengths = by_length(given)
    budgets = [] if adapted is None or adapted.budget is None else [adapted.budget]
    trainer = _kind_of_trainer(given)(
        lean=lean,
        piece_tokens=given.piece_tokens,
        eval_sets=given.evaluated,
        rates=dict(trained.rates),
        selection=selection,
        pull=keeping.pull if adapted is None else adapted.penalty,
        teacher=keeping.teacher,
        sampler=keeping.sampler or lengths or staged,
        keepers=[*keeping.keepers, *budgets],
        in_backward=job.optimizer_in_backward,
        on_host=job.offload_optimizer,
        model=model,
        args=training_arguments(
            job, given.machine, processes, given.total, given.partial.folder,
            evaluate_first=given.rhythm.evaluates and saved is None,
        ),
        train_dataset=[*given.samples, *given.replayed],
        data_collator=_batches(given),
        callbacks=[
            *_steps(selection, budgets, lengths),
            *keeping.callbacks,
            *_listeners(given, asked, bar, seconds),
        ],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    board = _board(given)
    for told in [*_speakers(given), *([] if board is None else [board])]:
        trainer.add_callback(told)
    return Assembly(trainer, trained, keeping, selection, adapted, board)


def _look(given: Assignment, model: Any, trained: Trained, saved: Saved | None) -> None:
    """Tell what is about to happen, and try the data on the model.

    Raises:
        UsageError: they do not fit.
    """
    job = given.job
    announce(
        job, given.base, given.machine, given.processes, trained, given.progress,
        name=given.name, total=given.total, longest=given.encoded["train"].longest, saved=saved,
    )  # fmt: skip
    saves = given.rhythm.save_step < given.total
    warn_of_disk(given.partial.folder, trained.parameters, given.progress, saves=saves)
    require_agreement(model, given.encoder, given.samples)
    what = f"train {job.train}" if job.adapter is None else f"adapter {job.adapter.name}"
    require_reach(model, given.encoder, [*given.samples, *given.replayed], what, given.progress)


def _attach(given: Assignment, model: Any) -> Adapted | None:
    """The model with the job's adapter, if it has one."""
    if given.job.adapter is None:
        return None
    from ktmerge.tuners.adapters.attach import Surroundings, attach

    upstream = given.encoded["kept"].samples if "kept" in given.encoded else []
    return attach(model, given.base, given.job, Surroundings(given.total, upstream, given.collator(), given.folder))


def _shard(given: Assignment, model: Any, *, lean: bool) -> None:
    """Cut the model into the parts of the processes.

    Raises:
        UsageError: its loss cannot be shared.
    """
    from ktmerge.tuners.sharding import shard

    if not lean:
        raise UsageError(
            f"{given.base.root}: has a loss of its own ({model.config.model_type}), which several processes cannot "
            "share; fine-tune it with one."
        )
    shard(model, given.processes, given.machine.device)


def _require_packable(given: Assignment, model: Any, *, lean: bool) -> None:
    """Refuse to pack for a model that would mix the samples of a row.

    Raises:
        UsageError: it would.
    """
    from ktmerge.tuners.packing import packs_faithfully

    if given.job.packing and (given.shows_images or not given.encoder.packs):
        raise UsageError("packing: samples with images cannot share a row; group_by_length saves padding, too.")
    if given.job.packing and not lean:
        raise UsageError(
            f"packing: this model ({model.config.model_type}) takes no mask as logits_to_keep, which packed rows need, "
            "or its loss has more terms; a newer transformers may, or leave it out: group_by_length saves padding."
        )
    if given.job.packing and not packs_faithfully(model, model.config.get_text_config().vocab_size):
        raise UsageError(
            f"packing: samples in one row would see each other in this model ({model.config.model_type}); "
            "leave it out, group_by_length saves padding, too."
        )


def _select(given: Assignment, model: Any, trained: Trained) -> Selection | None:
    from ktmerge.tuners.selection.selection import Selection

    if given.job.select == "none":
        return None
    parameters = {name: one for name, one in model.named_parameters() if name in trained.rates}
    parts = Parts([name for name, _ in model.named_parameters()], given.base.config)
    return Selection(given.job, parameters, parts, given.progress)


def _batches(given: Assignment) -> Any:
    from ktmerge.tuners.keeping.keeping import taught
    from ktmerge.tuners.trainer import build_collator

    row_tokens = (given.piece_tokens or 0) if given.job.packing else None
    tokenizer, extras = given.encoder.tokenizer, given.encoder.extras
    return build_collator(tokenizer, taught(given.job), row_tokens=row_tokens, extras=extras)


def _kind_of_trainer(given: Assignment) -> Callable[..., AnswerTrainer]:
    if given.processes.is_several:
        from ktmerge.tuners.sharded import ShardedTrainer

        return partial(ShardedTrainer, processes=given.processes, batch_size=given.job.batch_size)
    from ktmerge.tuners.trainer import AnswerTrainer

    return AnswerTrainer


def _steps(selection: Selection | None, budgets: list[Any], lengths: LengthSampler | None) -> list[Any]:
    """What changes with steps and epochs."""
    from ktmerge.tuners.callbacks import EpochCallback, StepCallback

    chosen = [] if selection is None else [StepCallback(selection.after_step)]
    return [*chosen, *budgets, *([] if lengths is None else [EpochCallback(lengths.set_epoch)])]


def _listeners(given: Assignment, asked: Interruption, bar: Step, seconds: Callable[[], float]) -> list[Any]:
    """What logs, and what saves."""
    from ktmerge.tuners.callbacks import LogCallback, RhythmCallback

    log = given.partial.log if given.processes.is_first else Path(os.devnull)
    return [
        LogCallback(log, given.rhythm, given.progress, bar, seconds),
        RhythmCallback(
            given.rhythm, asked, lambda path, step: given.partial.seal(path, step, seconds()), given.processes.any
        ),
    ]


def _speakers(given: Assignment) -> list[Any]:
    """What has the model speak; of several processes each has a part of it, and none could alone."""
    if not given.job.show_samples or not given.evaluated or given.processes.is_several:
        return []
    from ktmerge.tuners.speaking import Speaker, choose_prompts

    encoder = given.encoder
    prompts = choose_prompts(given.evaluated, given.job.show_samples, encoder.image_token)
    room = room_of(given.job, given.base)
    speaker = Speaker(
        prompts, encoder.tokenizer, encoder.stops, given.partial.log, given.progress, encoder.extras, room
    )
    return [speaker] if prompts else []


def _board(given: Assignment) -> BoardCallback | None:
    if not given.job.tensorboard or not given.processes.is_first:
        return None
    from ktmerge.tuners.board import FOLDER, BoardCallback

    return BoardCallback(given.partial.log, given.partial.folder / FOLDER)
