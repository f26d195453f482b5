"""The run without labels: how far models have moved from base and experts, and from their neighbours on a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval.encodings import Encodings
from ktmerge.eval.evaluation import free_memory
from ktmerge.eval.finite import NotFiniteError
from ktmerge.eval.loading import choose_device, choose_dtype
from ktmerge.eval.normalisation import NORMALISATIONS
from ktmerge.eval.scorer import score_model
from ktmerge.eval.scores import TaskScore
from ktmerge.eval.screened import NEIGHBOURS, Screened, ScreenedSet
from ktmerge.eval.sets import TaskSet, read_sets, suite_digest
from ktmerge.eval.statistics import groups_of
from ktmerge.eval.subject import Reference, Subject, subject
from ktmerge.eval.teachers import Answerer, Texts, prompts
from ktmerge.eval.unlabelled import disagreeing, divergence
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.suites import Suite, TextTask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BATCH = 8  # texts of a batch, where nothing else is said


def screen(
    models: Mapping[str, Reference],
    suite: Suite,
    *,
    base: Reference,
    experts: Mapping[str, Reference] | None = None,
    line: bool = False,
    weight: float = 0.5,
    batch_size: int | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    device: str = "auto",
    part: str | None = None,
    progress: Progress = SILENT,
) -> Screened:
    """Measure models without labels, for a cheap first choice among them.

    ``KL(base || model)`` on the prompts of the upstream sets says what may be forgotten, ``KL(expert || model)`` on the
    experts' own answers to the prompts of the downstream sets what is not learned. Two models are in memory at a time.

    Args:
        models: names and folders, as of ``evaluate``.
        suite: the sets; their right answers play no part.
        base: the untuned model.
        experts: by name; one with a downstream set's name is asked on that set, on any other set all are.
        line: the models stand in the order of a coefficient: compare the answers of neighbours, too.
        weight: of the experts in J, in [0, 1].
        batch_size: most sequences in a forward pass.
        bootstrap: resamples behind each interval.
        seed: of the resamples.
        device: auto, cpu or cuda.
        part: which rows, as of ``evaluate``.
        progress: where to report to.

    Raises:
        UsageError: something is wrong with suite, data or checkpoints, or models have different tokenizers.
        KtmergeError: a model is broken, or memory does not suffice.
    """
    if not models:
        raise UsageError("nothing to measure: name at least one model beside the base.")
    if line and len(models) < 2:
        raise UsageError("neighbours need at least two models on the line.")
    if not 0 <= weight <= 1:
        raise UsageError(f"the weight of the experts is {weight}; it must be from 0 to 1.")
    target = choose_device(device)
    sets = [one for one in read_sets(suite, part) if one.harness is None]
    teachers = {"the base": base, **{f"expert {name}": one for name, one in (experts or {}).items()}}
    subjects = {name: subject(one, base) for name, one in {**teachers, **models}.items()}
    encodings = Encodings(sets, {name: one.checkpoint for name, one in subjects.items()}, "the base")
    run = _Run(sets, encodings, subjects, list(models), target, batch_size, progress)
    run.refuse_other_tokenizers()
    found = run.to_base() + [one for name in experts or {} for one in run.to_expert(name, list(experts or {}))]
    if line:
        found += run.beside()
    if not found:
        raise UsageError("no set of the suite has anything to measure models on without labels.")
    return Screened(
        suite=suite.name, suite_digest=suite_digest([one.digest for one in sets]), models=list(models),
        base=subjects["the base"].path,
        experts={name: subjects[f"expert {name}"].path for name in experts or {}},
        paths={name: subjects[name].path for name in models},
        sets=found, weight=weight, bootstrap=bootstrap, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """What is the same for all that is measured."""

    sets: Sequence[TaskSet]
    encodings: Encodings
    subjects: Mapping[str, Subject]
    models: list[str]
    device: Any
    batch_size: int | None
    progress: Progress

    def refuse_other_tokenizers(self) -> None:
        own = self.encodings.of["the base"].fingerprint
        for name, encoding in self.encodings.of.items():
            if encoding.fingerprint != own:
                raise UsageError(
                    f"'{name}' has another tokenizer or chat template than the base; distributions over other tokens "
                    "do not compare."
                )

    def to_base(self) -> list[ScreenedSet]:
        """KL(base || model) on upstream prompts."""
        own = self.encodings.of["the base"]
        texts = {one.task.name: prompts(own.tasks[one.task.name], own.sight) for one in self._of("upstream")}
        with self._loaded("the base") as teacher:
            return self._distances("base", teacher, texts)

    def to_expert(self, expert: str, experts: Sequence[str]) -> list[ScreenedSet]:
        """KL(expert || model) on the expert's own answers to downstream prompts."""
        own = self.encodings.of["the base"]
        sets = [one for one in self._of("downstream") if one.task.name == expert or one.task.name not in experts]
        with self._loaded(f"expert {expert}") as teacher:
            answerer = Answerer(teacher, own.tokenizer, own.sight, self.batch_size, self.progress)
            texts = {}
            for one in sets:
                label = f"{expert}: {one.task.name}"
                with _named(label):
                    texts[one.task.name] = answerer.texts(one, own.tasks[one.task.name], label)
            return self._distances(expert, teacher, texts)

    def beside(self) -> list[ScreenedSet]:
        """Of every item, the share of neighbours on the line that answer otherwise."""
        own = self.encodings.of["the base"]
        sets = [one for one in self.sets if not isinstance(one.task, TextTask)]
        answers: list[dict[str, list[str]]] = []
        for name in self.models:
            with self._loaded(name) as model:
                scores = score_model(
                    model, own.tokenizer, sets, batch_size=self.batch_size, encoded=own.tasks, sight=own.sight,
                    progress=self.progress, label=name,
                )  # fmt: skip
            answers.append({task: _answers(score) for task, score in scores.items()})
        return [
            self._set(one.task.name, NEIGHBOURS, disagreeing([own[one.task.name] for own in answers])) for one in sets
        ]

    def _of(self, side: str) -> list[TaskSet]:
        return [one for one in self.sets if one.side == side]

    def _distances(self, teacher: str, loaded: Any, texts: Mapping[str, Texts]) -> list[ScreenedSet]:
        """KL(teacher || model) of every text, for every model and set."""
        own = self.encodings.of["the base"]
        found: dict[str, list[NDArray[np.float64]]] = {task: [] for task in texts}
        for name in self.models if texts else ():
            with self._loaded(name) as model:
                for task, one in texts.items():
                    label = f"{name}: {task}"
                    with _named(label):
                        found[task].append(divergence(
                            loaded, model, one.ids, starts=one.starts, views=one.views, sight=own.sight,
                            batch_size=self.batch_size or BATCH, progress=self.progress, label=label,
                        ))  # fmt: skip
        return [self._set(task, teacher, np.stack(own)) for task, own in found.items()]

    def _set(self, task: str, teacher: str, values: NDArray[np.float64]) -> ScreenedSet:
        own = next(one for one in self.sets if one.task.name == task)
        groups = groups_of(own.drawn_with(self.encodings.of["the base"].tasks[task].rows))
        return ScreenedSet(task, own.side, teacher, values, groups)

    @contextmanager
    def _loaded(self, name: str) -> Iterator[Any]:
        model = self.subjects[name].load(self.device, choose_dtype(self.device))
        try:
            yield model
        finally:
            del model
            free_memory(self.device)


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Say which model and set an error is of."""
    try:
        yield
    except NotFiniteError as error:
        raise KtmergeError(f"{label}, text {error.number + 1}: {error}") from error
    except UsageError as error:
        raise UsageError(f"{label}: {error}") from None


def _answers(score: TaskScore) -> list[str]:
    """What a model answers to each item, so that equal answers are equal texts."""
    if "outputs" in score.details:
        return [NORMALISATIONS["strip"](said) for said in score.details["outputs"]]
    return [str(number) for number in score.details["predicted"]]
