"""The training itself: from a base, or a saved state, to trained weights in the working folder."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints import Checkpoint, Parts
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.errors import UsageError
from ktmerge.progress import Progress, Step
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners.announcement import announce, warn_of_disk
from ktmerge.tuners.arguments import total_steps, training_arguments
from ktmerge.tuners.encode import Encoded, EncodedSet, Encoder
from ktmerge.tuners.failures import explaining
from ktmerge.tuners.images.agreement import require_agreement, shows_images
from ktmerge.tuners.loss import PIECE_TOKENS, projects_faithfully
from ktmerge.tuners.machine import (
    choose_machine,
    deterministic,
    is_out_of_memory,
)
from ktmerge.tuners.model import load_model
from ktmerge.tuners.partial import Partial, Saved
from ktmerge.tuners.processes import ALONE, Processes
from ktmerge.tuners.reach import require_reach
from ktmerge.tuners.report import LOSSES, draw_losses
from ktmerge.tuners.trained import choose_trained

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.checkpoints.statistics import Statistics
    from ktmerge.tuners.adapters.attach import Adapted
    from ktmerge.tuners.board import BoardCallback
    from ktmerge.tuners.callbacks import Interruption, Rhythm
    from ktmerge.tuners.curriculum import Ordered
    from ktmerge.tuners.packing import LengthSampler
    from ktmerge.tuners.selection.selection import Selection
    from ktmerge.tuners.trainer import AnswerTrainer

EVALUATED = ("upstream", "downstream")
"""The sets whose losses are told while training."""
CURRICULUM = "ktmerge-curriculum.json"
"""File beside the expert: the score of every sample, the lower the earlier, and the order; with a curriculum."""
FACTS = "run.json"
"""File beside the trained weights: how the training went."""


class TrainingRun:
    """One job on its way through the Trainer.

    Args:
        encoded: the samples; ``train``, and if wanted ``upstream`` and ``downstream``.
        name: what the progress bar calls it.
        fisher: opened statistics, if the job names some.
        processes: all that take part.
        folder: where the job's relative paths start.
        sizes: samples of each data file.
    """

    def __init__(
        self,
        job: FinetuneJob,
        base: Checkpoint,
        encoder: Encoder,
        encoded: Mapping[str, EncodedSet],
        partial: Partial,
        name: str,
        progress: Progress,
        fisher: Statistics | None = None,
        processes: Processes = ALONE,
        folder: Path = Path(),
        sizes: Sequence[int] = (),
    ) -> None:
        self._folder, self._sizes = folder, sizes
        self._processes = processes
        self._job, self._base, self._encoder, self._encoded = job, base, encoder, encoded
        self._partial, self._name, self._progress = partial, name, progress
        self._fisher = fisher
        self._machine = choose_machine(job.precision)
        if job.offload_optimizer and self._machine.device == "cpu":
            progress.note("offload_optimizer: without a CUDA device everything is in the host's memory already.")
            self._job = job = job.model_copy(update={"offload_optimizer": False})
        # in the backward pass a tensor is stepped once, so that a batch is taken whole
        # and of several processes all must take part in every pass
        split = self._machine.device == "cpu" and not job.optimizer_in_backward and not processes.is_several
        self._piece_tokens = PIECE_TOKENS if split else None
        self._shows_images = shows_images(encoded.values())
        if self._shows_images:
            self._piece_tokens = None  # the rows of pixels are not those of samples
        self._total = total_steps(job, len(encoded["train"].samples))

    def train(self, saved: Saved | None) -> None:
        """Train to the end and seal the result.

        Raises:
            KtmergeError: out of memory, a full disk, a loss that is no number.
            KeyboardInterrupt: asked to stop; the state is saved first.
        """
        from ktmerge.tuners.callbacks import Interruption

        started, earlier = monotonic(), saved.seconds if saved else 0.0
        with (
            explaining(
                self._job, self._partial, self._processes, self._encoded["train"].longest, self._machine.device
            ),  # fmt: skip
            quiet_transformers(),
            _without_warnings(),
            deterministic(self._machine.device),
            Interruption(self._progress) as asked,
            self._progress.task(f"fine-tuning {self._name}", self._total, "steps") as bar,
        ):
            bar.advance(saved.step if saved else 0)
            trainer = self._trainer(saved, asked, bar, lambda: earlier + monotonic() - started)
            self._fit(trainer, saved)
            step = int(trainer.state.global_step)
            guard = self._keeping.guard
            if guard is not None and guard.stopped:
                guard.restore()
                self._progress.note(
                    f"stopped at step {step}: the upstream loss is above {guard.limit:.4f}; "
                    f"the result is that of step {guard.step}."
                )
            if step >= self._total or (guard is not None and guard.stopped):
                self._seal(trainer, earlier + monotonic() - started)
            del trainer, self._keeping, self._selection, self._adapted  # their memory is wanted for the export
            gc.collect()
        if asked.requested:
            self._progress.note(f"stopped after step {step} of {self._total}; go on with --resume.")
            raise KeyboardInterrupt

    def _fit(self, trainer: AnswerTrainer, saved: Saved | None) -> None:
        try:
            trainer.train(resume_from_checkpoint=str(saved.path) if saved else None)
        except KeyboardInterrupt:
            if self._partial.has_state:
                self._progress.note("stopped at once; go on from the last saved step with --resume.")
            raise
        except Exception as error:
            if is_out_of_memory(error):
                self._save_what_is_done(trainer, error)
            raise

    def _save_what_is_done(self, trainer: AnswerTrainer, error: Exception) -> None:
        """Memory ran out: free what the failed step holds, and save the state before it."""
        clear_frames(error.__traceback__)
        gc.collect()
        with suppress(Exception):  # the error that is told is the first one
            trainer.save_last_step()
        newest = self._partial.newest()
        if newest is not None:
            self._progress.note(f"kept the state after step {newest.step} of {self._total}; go on with --resume.")

    def _trainer(
        self, saved: Saved | None, asked: Interruption, bar: Step, seconds: Callable[[], float]
    ) -> AnswerTrainer:
        from transformers import PrinterCallback, set_seed

        from ktmerge.tuners.callbacks import EpochCallback, LogCallback, RhythmCallback, StepCallback
        from ktmerge.tuners.keeping.keeping import Keeping, taught
        from ktmerge.tuners.trainer import build_collator

        set_seed(self._job.seed)
        model = load_model(self._base, self._progress, sees="vision_config" in self._base.config)
        if not self._processes.is_several:
            model.to(self._machine.device)  # before anything is copied of it
        alone = not self._processes.is_several
        staged = self._by_curriculum(model) if alone else None  # an untrained adapter need not be the base
        self._adapted = adapted = self._attach(model)
        if adapted is None:
            trained = choose_trained(model, self._base, self._job)
        else:
            model, trained = adapted.model, adapted.trained
        self._trained = trained
        announce(
            self._job, self._base, self._machine, self._processes, trained, self._progress,
            name=self._name, total=self._total, longest=self._encoded["train"].longest, saved=saved,
        )  # fmt: skip
        saves = self._rhythm().save_step < self._total
        warn_of_disk(self._partial.folder, trained.parameters, self._progress, saves=saves)
        rhythm = self._rhythm()
        samples, replayed = self._samples()
        require_agreement(model, self._encoder, samples)
        what = f"train {self._job.train}" if self._job.adapter is None else f"adapter {self._job.adapter.name}"
        require_reach(model, self._encoder, [*samples, *replayed], what, self._progress)
        if self._job.activation_checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        lean = projects_faithfully(model, model.config.get_text_config().vocab_size)
        self._require_packable(model, lean=lean)
        if self._processes.is_several:
            self._shard(model, lean=lean)
        self._selection = self._select(model)
        self._keeping = keeping = Keeping.of(
            self._job,
            self._base,
            model,
            lean=lean,
            total=self._total,
            samples=(len(samples), len(replayed)),
            fisher=self._fisher,
        )
        by_length = self._by_length()
        staged = staged if alone else self._by_curriculum(model)
        log = self._partial.log if self._processes.is_first else Path(os.devnull)
        budgets = [] if adapted is None or adapted.budget is None else [adapted.budget]
        listeners = [StepCallback(self._selection.after_step)] if self._selection is not None else []
        trainer = self._kind_of_trainer()(
            lean=lean,
            piece_tokens=self._piece_tokens,
            eval_sets={name: found.samples for name, found in self._encoded.items() if name in EVALUATED},
            rates=dict(trained.rates),
            selection=self._selection,
            pull=keeping.pull if adapted is None else adapted.penalty,
            teacher=keeping.teacher,
            sampler=keeping.sampler or by_length or staged,
            keepers=[*keeping.keepers, *budgets],
            in_backward=self._job.optimizer_in_backward,
            on_host=self._job.offload_optimizer,
            model=model,
            args=training_arguments(
                self._job,
                self._machine,
                self._processes,
                self._total,
                self._partial.folder,
                evaluate_first=rhythm.evaluates and saved is None,
            ),
            train_dataset=[*samples, *replayed],
            data_collator=build_collator(
                self._encoder.tokenizer,
                taught(self._job),
                row_tokens=(self._piece_tokens or 0) if self._job.packing else None,
                extras=self._encoder.extras,
            ),
            callbacks=[
                *listeners,
                *budgets,
                *([] if by_length is None else [EpochCallback(by_length.set_epoch)]),
                *keeping.callbacks,
                LogCallback(
                    log,
                    rhythm,
                    self._progress,
                    bar,
                    seconds,
                ),
                RhythmCallback(
                    rhythm, asked, lambda path, step: self._partial.seal(path, step, seconds()), self._processes.any
                ),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        for told in self._audience():
            trainer.add_callback(told)
        return trainer

    def _audience(self) -> list[Any]:
        """What shows the run to a person beside the log."""
        found: list[Any] = []
        sets = {name: self._encoded[name].samples for name in EVALUATED if name in self._encoded}
        # of several processes each has a part of the model, and none could speak alone
        if self._job.show_samples and sets and not self._processes.is_several:
            from ktmerge.tuners.speaking import Speaker, choose_prompts

            encoder, log = self._encoder, self._partial.log
            prompts = choose_prompts(sets, self._job.show_samples, encoder.image_token)
            speaker = Speaker(prompts, encoder.tokenizer, encoder.stops, log, self._progress, encoder.extras)
            found += [speaker] if prompts else []
        self._board: BoardCallback | None = None
        if self._job.tensorboard and self._processes.is_first:
            from ktmerge.tuners.board import FOLDER, BoardCallback

            self._board = BoardCallback(self._partial.log, self._partial.folder / FOLDER)
            found.append(self._board)
        return found

    def _attach(self, model: Any) -> Adapted | None:
        """The model with the job's adapter, if it has one."""
        if self._job.adapter is None:
            return None
        from ktmerge.tuners.adapters.attach import Surroundings, attach
        from ktmerge.tuners.trainer import build_collator

        upstream = self._encoded["kept"].samples if "kept" in self._encoded else []
        collator = build_collator(self._encoder.tokenizer, extras=self._encoder.extras)
        around = Surroundings(self._total, upstream, collator, self._folder)
        return attach(model, self._base, self._job, around)

    def _save_adapted(self, trainer: AnswerTrainer, told: dict[str, Any]) -> Callable[[Any, Path], None] | None:
        """How the model is saved if it has an adapter; what is to be told of it goes into ``told``."""
        adapted = self._adapted
        if adapted is None:
            return None
        from ktmerge.tuners.adapters.saving import probe, save_result

        def save(model: Any, folder: Path) -> None:
            logits = probe(trainer, self._encoded["train"].samples)
            told.update(save_result(adapted, folder, self._partial.kept_adapter, logits))

        return save

    def _shard(self, model: Any, *, lean: bool) -> None:
        """Cut the model into the parts of the processes.

        Raises:
            UsageError: its loss cannot be shared.
        """
        from ktmerge.tuners.sharding import shard

        if not lean:
            raise UsageError(
                f"{self._base.root}: has a loss of its own ({model.config.model_type}), which several processes cannot "
                "share; fine-tune it with one."
            )
        shard(model, self._processes, self._machine.device)

    def _kind_of_trainer(self) -> Callable[..., AnswerTrainer]:
        if self._processes.is_several:
            from ktmerge.tuners.sharded import ShardedTrainer

            return partial(ShardedTrainer, processes=self._processes, batch_size=self._job.batch_size)
        from ktmerge.tuners.trainer import AnswerTrainer

        return AnswerTrainer

    def _require_packable(self, model: Any, *, lean: bool) -> None:
        """Refuse to pack for a model that would mix the samples of a row.

        Raises:
            UsageError: it would.
        """
        from ktmerge.tuners.packing import packs_faithfully

        if self._job.packing and (self._shows_images or not self._encoder.packs):
            raise UsageError("packing: samples with images cannot share a row; group_by_length saves padding, too.")
        if self._job.packing and not (lean and packs_faithfully(model, model.config.get_text_config().vocab_size)):
            raise UsageError(
                f"packing: samples in one row would see each other in this model ({model.config.model_type}); "
                "leave it out, group_by_length saves padding, too."
            )

    def _by_curriculum(self, model: Any) -> Ordered | None:
        job, found = self._job, self._encoded["train"]
        if job.curriculum not in ("easy", "common"):
            return None
        from ktmerge.tuners import curriculum
        from ktmerge.tuners.trainer import build_collator

        collate = build_collator(self._encoder.tokenizer, extras=self._encoder.extras)

        def scores() -> Tensor:
            if job.curriculum == "easy":
                return curriculum.difficulties(model, found.samples, collate, job.batch_size, self._progress)
            tasks = curriculum.tasks_of(self._sizes, found.places)
            return curriculum.strangeness(model, found.samples, tasks, collate, job.batch_size, self._progress)

        self._progress.note(
            f"curriculum {job.curriculum}: {self._total} steps; its control is the same with curriculum=none and "
            f"max_steps={self._total}."
        )
        return curriculum.ordered(scores, self._partial.folder / CURRICULUM)

    def _by_length(self) -> LengthSampler | None:
        from ktmerge.tuners.packing import LengthSampler

        job = self._job
        lengths = [len(sample) for sample in self._encoded["train"].samples]
        return LengthSampler(lengths, job.samples_a_step, job.seed) if job.group_by_length else None

    def _samples(self) -> tuple[list[Encoded], list[Encoded]]:
        """What is trained on, and what is replayed beside it."""
        old = self._encoded["replay"].samples if "replay" in self._encoded else []
        return self._encoded["train"].samples, [replace(sample, replayed=True) for sample in old]

    def _select(self, model: Any) -> Selection | None:
        from ktmerge.tuners.selection.selection import Selection

        if self._job.select == "none":
            return None
        parameters = {name: one for name, one in model.named_parameters() if name in self._trained.rates}
        parts = Parts([name for name, _ in model.named_parameters()], self._base.config)
        return Selection(self._job, parameters, parts, self._progress)

    def _rhythm(self) -> Rhythm:
        from ktmerge.tuners.callbacks import Rhythm

        return Rhythm(
            total=self._total,
            log_every=self._job.log_every,
            eval_every=self._job.eval_every or max(1, math.ceil(self._total / 10)),
            save_every=self._job.save_every,
            evaluates=not self._encoded.keys().isdisjoint(EVALUATED),
        )

    def _seal(self, trainer: AnswerTrainer, seconds: float) -> None:
        """Keep the trained weights, under transformers' names for files, and how it went; checkpoints may go then."""
        from transformers import GenerationConfig

        from ktmerge.tuners.ending import save_weights

        final = self._partial.final
        model: Any = trainer.model
        plain: Any = GenerationConfig
        model.generation_config = plain()  # the base's travels as a file; an odd one would be refused here
        told: dict[str, Any] = {}
        save = self._save_adapted(trainer, told)
        averages = save_weights(trainer, self._keeping, self._job, self._partial, self._progress, save)
        if self._selection is not None:
            self._selection.publish(final, self._base)
        facts = {
            "steps": int(trainer.state.global_step),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(trainer.tokens_per_second, 1),
            "device": self._machine.name,
            "precision": self._machine.precision,
            "threads": self._machine.threads,
            **({"processes": self._processes.count} if self._processes.is_several else {}),
            "seed": self._job.seed,
            "parameters": self._trained.total,
            "trained": self._trained.to_json(),
            **averages,
            **told,
        }
        order = self._partial.folder / CURRICULUM
        if order.exists():
            shutil.copyfile(order, final / CURRICULUM)
        if self._processes.is_first:
            (final / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            (final / LOSSES).write_bytes(draw_losses(self._partial.log, self._name))
        if self._board is not None:
            self._board.publish(final)
        self._partial.seal(final, self._total, seconds)
        self._partial.drop_checkpoints()


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
