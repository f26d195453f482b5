"""The run: every model of a comparison on every set, one model in memory at a time, the base first."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ktmerge import __version__
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.files import file_digest
from ktmerge.errors import UsageError, did_you_mean
from ktmerge.eval.encode import Encoded
from ktmerge.eval.encodings import Encoding, Encodings
from ktmerge.eval.harness import NO_FILTER, HarnessSet
from ktmerge.eval.items import (
    AskedItem,
    ChoiceItem,
    GenerateItem,
    InstructionsItem,
    LetterItem,
    TextItem,
    whole_prompt,
)
from ktmerge.eval.loading import choose_device, choose_dtype
from ktmerge.eval.results import Results
from ktmerge.eval.rows import part_named
from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore
from ktmerge.eval.sets import TaskSet, read_sets, suite_digest
from ktmerge.eval.store import ScoreStore
from ktmerge.eval.subject import Reference, Subject, subject
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.suites import Suite


def evaluate(
    models: Mapping[str, Reference],
    suite: Suite,
    *,
    base: str = "base",
    batch_size: int | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    device: str = "auto",
    reference: str | None = None,
    part: str | None = None,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Results:
    """Score every model on every set of ``suite``.

    Data, templates, checkpoints' headers and tokenizers are all checked before the first model is loaded.

    Args:
        models: names and folders of checkpoints, or of adapters for the one called ``base``, or pairs of both; all are
            compared with the base, which is scored first.
        suite: the sets.
        base: name of the untuned model.
        batch_size: most sequences in a forward pass, by default what fits into memory; scores do not depend on it.
        bootstrap: resamples behind each interval.
        seed: of the resamples.
        device: auto, cpu or cuda.
        reference: name of the model whose gain counts as the whole of the gain share, usually the full fine-tune.
        part: which rows to score: all, those for selection or those for the report; by default the report's where the
            suite keeps some for selection.
        cache: folder of scores kept from run to run; what it has is not scored again.
        progress: where to report to.

    Raises:
        UsageError: something is wrong with suite, data or checkpoints.
        KtmergeError: scoring failed: broken weights, out of memory.
    """
    for role, name in (("base", base), ("reference", reference)):
        if name is not None and name not in models:
            raise UsageError(f"the {role} '{name}' is not among the models.{did_you_mean(name, models)}")
    target = choose_device(device)
    sets = read_sets(suite, part)
    ordered = {base: models[base], **models}
    subjects = {name: subject(one, models[base]) for name, one in ordered.items()}
    encodings = Encodings(sets, {name: one.checkpoint for name, one in subjects.items()}, base)
    scores: dict[str, dict[str, TaskScore]] = {}
    infos: dict[str, ModelInfo] = {}
    run = _Run(sets, encodings, target, batch_size, ScoreStore(cache) if cache is not None else None, progress)
    for name, one in subjects.items():
        scores[name], infos[name] = run.score(name, one)
    for warning in encodings.warnings:
        progress.note(f"warning: {warning}")
    tasks = [_task_info(one, encodings.of[base].tasks[one.task.name]) for one in sets]
    return Results(
        suite=suite.name,
        suite_digest=suite_digest([task.digest for task in tasks]),
        tasks=tasks,
        models=infos,
        scores=scores,
        base=base,
        reference=reference,
        bootstrap=bootstrap,
        seed=seed,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions() | _harness_version(sets),
        warnings=encodings.warnings,
        part=part_named(part, suite.selection),
    )


def require_scorable(base: Path, suite: Suite) -> None:
    """Read and encode every set for the base, to find what is wrong before there are models to score.

    Raises:
        UsageError: something is wrong with suite or data, or does not fit the base.
    """
    Encodings(read_sets(suite), {"base": subject(base, base).checkpoint}, "base")


def versions() -> dict[str, str]:
    """What could change a score: ktmerge, the libraries, Python."""
    libraries = ("torch", "transformers", "tokenizers", "numpy")
    found = {name: version(name) for name in libraries}
    return {"ktmerge": __version__, **found, "python": platform.python_version()}


def _harness_version(sets: Sequence[TaskSet]) -> dict[str, str]:
    return {"lm_eval": version("lm_eval")} if any(one.harness is not None for one in sets) else {}


@dataclass(frozen=True)
class _Run:
    """What is the same for all models of a run."""

    sets: Sequence[TaskSet]
    encodings: Encodings
    device: Any
    batch_size: int | None
    store: ScoreStore | None
    progress: Progress

    def score(self, name: str, subject: Subject) -> tuple[dict[str, TaskScore], ModelInfo]:
        """Score one model; what the store has of it is taken from there, what is new is put there set by set."""
        started = time.monotonic()
        checkpoint, digest = subject.checkpoint, subject.digest(self.progress)
        encoding, dtype = self.encodings.of[name], choose_dtype(self.device)
        info = ModelInfo(
            path=subject.path,
            digest=digest,
            tokenizer=encoding.fingerprint,
            device=str(self.device),
            dtype=str(dtype).removeprefix("torch."),
            seconds=0.0,
        )
        keys = self._keys(info, checkpoint)
        scores = self._stored(keys, encoding)
        if scores:
            self.progress.note(f"{name}: {len(scores)} of {len(self.sets)} sets were scored before")
        missing = [one for one in self.sets if one.task.name not in scores]
        if missing:
            scores |= self._measured(name, subject, missing, encoding, dtype, keys)
        ordered = {one.task.name: scores[one.task.name] for one in self.sets}
        return ordered, replace(info, seconds=round(time.monotonic() - started, 2))

    def _keys(self, info: ModelInfo, checkpoint: Checkpoint) -> dict[str, str]:
        if self.store is None:
            return {}
        conditions = {
            "model": info.digest,
            "config": _configuration(checkpoint),
            "tokenizer": info.tokenizer,
            "length": self.encodings.max_length,
            "device": self.device.type,
            "dtype": info.dtype,
            **versions(),
        }
        return {one.task.name: self.store.key(one, conditions) for one in self.sets}

    def _stored(self, keys: Mapping[str, str], encoding: Encoding) -> dict[str, TaskScore]:
        if self.store is None:
            return {}
        found = {name: self.store.get(key) for name, key in keys.items()}
        return {
            name: score
            for name, score in found.items()
            if score is not None and len(score.scores) == len(encoding.tasks[name].rows)
        }

    def _measured(
        self,
        name: str,
        subject: Subject,
        sets: Sequence[TaskSet],
        encoding: Encoding,
        dtype: Any,
        keys: Mapping[str, str],
    ) -> dict[str, TaskScore]:
        from ktmerge.eval.scorer import score_model

        def keep(task: str, score: TaskScore) -> None:
            why = self.store.put(keys[task], score) if self.store is not None else ""
            if why:
                self.progress.note(f"warning: {task}: its scores are not kept for the next run: {why}")

        model = subject.load(self.device, dtype)
        try:
            return score_model(
                model, encoding.tokenizer, sets, batch_size=self.batch_size, encoded=encoding.tasks,
                sight=encoding.sight, progress=self.progress, label=name, done=keep,
            )  # fmt: skip
        finally:
            del model
            free_memory(self.device)


def _configuration(checkpoint: Checkpoint) -> str:
    """sha256 of what config.json and generation_config.json say: equal weights may compute different things."""
    said = {
        key: value for key, value in checkpoint.config.items() if key not in ("transformers_version", "_name_or_path")
    }
    file = checkpoint.root / "generation_config.json"
    ends = file_digest(file) if file.is_file() else ""
    return hashlib.sha256(json.dumps([said, ends], sort_keys=True, default=str).encode()).hexdigest()


def free_memory(device: Any) -> None:
    """Give back what a model held."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _task_info(one: TaskSet, encoded: Encoded) -> TaskInfo:
    if one.harness is not None:
        return _harness_info(one, one.harness, encoded)
    items = [item for item in one.items if not isinstance(item, TextItem)]
    return TaskInfo(
        name=one.task.name,
        side=one.side,
        kind=one.task.kind,
        metric=one.task.metric,
        digest=one.digest,
        data_digest=one.data_digest,
        rows=encoded.rows,
        prompts=[whole_prompt(item) for item in items],
        references=[_reference(item) for item in items],
        choices=[list(item.choices) for item in items if isinstance(item, ChoiceItem | LetterItem)],
        truncated=encoded.truncated,
        skipped=encoded.skipped,
        clusters=one.drawn_with(encoded.rows) if one.clusters else [],
    )


def _harness_info(one: TaskSet, made: HarnessSet, encoded: Encoded) -> TaskInfo:
    metric, by = made.metric
    return TaskInfo(
        name=one.task.name, side=one.side, kind=one.task.kind, digest=one.digest, data_digest=one.data_digest,
        metric=metric if by == NO_FILTER else f"{metric},{by}",
        rows=encoded.rows, prompts=made.prompts, references=made.references, choices=made.choices,
    )  # fmt: skip


def _reference(item: AskedItem) -> Any:
    """Index of the right choice, or the reference answer; all, where there are several; the kinds of instructions."""
    if isinstance(item, InstructionsItem):
        return [one.kind for one in item.instructions]
    if isinstance(item, ChoiceItem) and item.others:
        return list(item.right)
    if not isinstance(item, GenerateItem):
        return item.answer
    return item.answers[0] if len(item.answers) == 1 else list(item.answers)
