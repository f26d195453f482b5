"""The training itself: from a base, or a saved state, to trained weights in the working folder."""

from __future__ import annotations

import gc
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints import Checkpoint, Parts
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.errors import KtmergeError, first_line
from ktmerge.progress import Progress, Step
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners.encode import Encoded, EncodedSet, Encoder
from ktmerge.tuners.images.agreement import require_agreement, shows_images
from ktmerge.tuners.loss import PIECE_TOKENS, projects_faithfully
from ktmerge.tuners.machine import (
    choose_machine,
    deterministic,
    is_disk_trouble,
    is_out_of_memory,
    memory_available,
    memory_needed,
    state_bytes,
)
from ktmerge.tuners.model import load_model
from ktmerge.tuners.partial import Partial, Saved
from ktmerge.tuners.trained import Trained, choose_trained

if TYPE_CHECKING:
    from ktmerge.checkpoints.statistics import Statistics
    from ktmerge.tuners.callbacks import Interruption, Rhythm
    from ktmerge.tuners.selection.selection import Selection
    from ktmerge.tuners.trainer import AnswerTrainer

EVALUATED = ("upstream", "downstream")
"""The sets whose losses are told while training."""
FACTS = "run.json"
"""File beside the trained weights: how the training went."""


class TrainingRun:
    """One job on its way through the Trainer.

    Args:
        encoded: the samples; ``train``, and if wanted ``upstream`` and ``downstream``.
        name: what the progress bar calls it.
        fisher: opened statistics, if the job names some.
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
    ) -> None:
        self._job, self._base, self._encoder, self._encoded = job, base, encoder, encoded
        self._partial, self._name, self._progress = partial, name, progress
        self._fisher = fisher
        self._machine = choose_machine(job.precision)
        self._piece_tokens = PIECE_TOKENS if self._machine.device == "cpu" else None
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
            self._explaining(),
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
            del trainer, self._keeping, self._selection  # their memory is wanted for the export
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

    def _announce(self, saved: Saved | None, trained: Trained) -> None:
        job, machine = self._job, self._machine
        samples = job.batch_size * job.gradient_accumulation
        start = f"going on after step {saved.step} of" if saved else "training"
        self._progress.note(
            f"{self._name}: {start} {self._total} steps of {samples} samples, on {machine.name}, {machine.precision}."
        )
        if job.replay:
            self._progress.note(f"replay: {job.replayed} of the {job.batch_size} samples of every batch.")
        for line in trained.lines(state_bytes(job)):
            self._progress.note(line)
        for asked, other in trained.shared:
            self._progress.note(f"{asked} and {other} share one tensor in this model: training one trains both.")
        longest = self._encoded["train"].longest
        needed = memory_needed(self._base, job, longest, self._piece_tokens, machine.precision, trained.parameters)
        free = memory_available(machine.device)
        if needed > free:
            self._progress.note(
                f"this may not fit into memory: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. "
                f"{_less_memory(job, longest)}"
            )

        self._warn_of_disk(trained.parameters)

    def _warn_of_disk(self, parameters: int) -> None:
        # the result twice, under the Trainer's names and the base's, and up to three checkpoints with moments
        needed = parameters * (8 + (36 if self._rhythm().save_step < self._total else 0))
        free = shutil.disk_usage(self._partial.folder).free
        if needed > free:
            self._progress.note(f"the disk may run full: up to {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free.")

    def _trainer(
        self, saved: Saved | None, asked: Interruption, bar: Step, seconds: Callable[[], float]
    ) -> AnswerTrainer:
        from transformers import PrinterCallback, set_seed

        from ktmerge.tuners.callbacks import LogCallback, RhythmCallback, StepCallback
        from ktmerge.tuners.keeping.keeping import Keeping, taught
        from ktmerge.tuners.trainer import AnswerTrainer, build_collator

        set_seed(self._job.seed)
        model = load_model(self._base, self._progress, sees="vision_config" in self._base.config)
        model.to(self._machine.device)  # before anything is copied of it
        self._trained = trained = choose_trained(model, self._base, self._job)
        self._announce(saved, trained)
        if self._job.activation_checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        rhythm = self._rhythm()
        require_agreement(model, self._encoder, self._encoded["train"].samples)
        lean = projects_faithfully(model, model.config.get_text_config().vocab_size)
        samples, replayed = self._samples()
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
        listeners = [StepCallback(self._selection.after_step)] if self._selection is not None else []
        trainer = AnswerTrainer(
            lean=lean,
            piece_tokens=self._piece_tokens,
            eval_sets={name: found.samples for name, found in self._encoded.items() if name in EVALUATED},
            rates=dict(trained.rates),
            selection=self._selection,
            pull=keeping.pull,
            teacher=keeping.teacher,
            sampler=keeping.sampler,
            keepers=keeping.keepers,
            model=model,
            args=self._arguments(evaluate_first=rhythm.evaluates and saved is None),
            train_dataset=[*samples, *replayed],
            data_collator=build_collator(self._encoder.tokenizer, taught(self._job), extras=self._encoder.extras),
            callbacks=[
                *listeners,
                *keeping.callbacks,
                LogCallback(self._partial.log, rhythm, self._progress, bar, seconds),
                RhythmCallback(rhythm, asked, lambda path, step: self._partial.seal(path, step, seconds())),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

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

    def _arguments(self, *, evaluate_first: bool) -> Any:
        from transformers import TrainingArguments

        job, machine = self._job, self._machine
        arguments = TrainingArguments(
            output_dir=str(self._partial.folder),
            max_steps=self._total,
            per_device_train_batch_size=job.batch_size,
            gradient_accumulation_steps=job.gradient_accumulation,
            learning_rate=job.learning_rate,
            lr_scheduler_type=job.scheduler,
            warmup_steps=warmup_steps(job, self._total),
            weight_decay=job.weight_decay,
            max_grad_norm=job.max_grad_norm,
            optim="adamw_torch_fused",
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
        )
        # of several devices the Trainer would make a torch.nn.DataParallel, which is slower than one of them
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    def _seal(self, trainer: AnswerTrainer, seconds: float) -> None:
        """Keep the trained weights, under transformers' names for files, and how it went; checkpoints may go then."""
        from transformers import GenerationConfig

        from ktmerge.tuners.ending import save_weights

        final = self._partial.final
        model: Any = trainer.model
        plain: Any = GenerationConfig
        model.generation_config = plain()  # the base's travels as a file; an odd one would be refused here
        averages = save_weights(trainer, self._keeping, self._job, self._partial, self._progress)
        if self._selection is not None:
            self._selection.publish(final, self._base)
        facts = {
            "steps": int(trainer.state.global_step),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(trainer.tokens_per_second, 1),
            "device": self._machine.name,
            "precision": self._machine.precision,
            "threads": self._machine.threads,
            "seed": self._job.seed,
            "parameters": self._trained.total,
            "trained": self._trained.to_json(),
            **averages,
        }
        (final / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self._partial.seal(final, self._total, seconds)
        self._partial.drop_checkpoints()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Answer the failures that users can do something about."""
        try:
            yield
        except KtmergeError:
            raise
        except Exception as error:  # the libraries have no common type for either failure
            if is_out_of_memory(error):
                raise KtmergeError(
                    f"out of memory while fine-tuning. {_less_memory(self._job, self._encoded['train'].longest)}"
                ) from error
            if is_disk_trouble(error):
                raise KtmergeError(
                    f"{self._partial.folder}: cannot be written ({first_line(error)}); "
                    "free some space and go on with --resume."
                ) from error
            raise


def total_steps(job: FinetuneJob, samples: int) -> int:
    """Optimizer steps of a job on so many samples."""
    an_epoch = math.ceil(math.ceil(samples / (job.batch_size - job.replayed)) / job.gradient_accumulation)
    return job.max_steps or max(1, math.ceil(job.epochs * an_epoch))


def warmup_steps(job: FinetuneJob, total: int) -> int:
    """Steps over which the rate rises; the first of them has rate 0, so that one step at least remains."""
    return min(total - 1, round(total * job.warmup) if job.warmup < 1 else int(job.warmup))


def _less_memory(job: FinetuneJob, longest: int) -> str:
    half = max(1, job.batch_size // 2)
    return (
        f"Set batch_size={half} and gradient_accumulation={job.gradient_accumulation * max(1, job.batch_size // half)} "
        f"(same result, less memory), activation_checkpointing=true, or a max_length below {longest}, the longest "
        "sample."
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
