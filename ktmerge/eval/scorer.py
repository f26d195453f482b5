"""One loaded model on the sets of a suite: each kind of task its way, item scores out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.checkpoints.limits import context_length
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval import metrics
from ktmerge.eval.batching import answers_at_once
from ktmerge.eval.encode import Encoded
from ktmerge.eval.finite import NotFiniteError
from ktmerge.eval.generate import generate
from ktmerge.eval.harness import score_harness
from ktmerge.eval.items import ChoiceItem
from ktmerge.eval.likelihood import LikelihoodScorer
from ktmerge.eval.marking import mark
from ktmerge.eval.scores import TaskScore
from ktmerge.eval.sets import TaskSet, encode_sets, read_sets
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.harness import HarnessTask
from ktmerge.recipes.suites import ChoiceTask, ClassifyTask, SaidTask, Suite, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight

ANSWERED = 2048  # tokens of a prompt and its answer that memory is kept for where lm_eval generates


def score_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite | Sequence[TaskSet],
    *,
    batch_size: int | None = None,
    encoded: Mapping[str, Encoded] | None = None,
    sight: Sight | None = None,
    progress: Progress = SILENT,
    label: str = "model",
    done: Callable[[str, TaskScore], None] | None = None,
) -> dict[str, TaskScore]:
    """Score a loaded model; results by task name, upstream first.

    For many candidates of one architecture, read the sets once (``read_sets``) and encode them once (``encode_sets``).

    Args:
        model: a causal transformers model; its training mode is put back afterwards.
        tokenizer: the model's.
        suite: a suite, or its sets already read.
        batch_size: most sequences in a forward pass, by default what fits into memory; scores do not depend on it.
        encoded: the sets in this tokenizer's tokens, if at hand.
        sight: prepares prompts with images for this model; needed where sets show images.
        progress: where to report to.
        label: names the model there and in messages.
        done: is told each task's name and score as soon as it is there.

    Raises:
        UsageError: something is wrong with the suite or its data.
        KtmergeError: scoring failed: broken weights, out of memory.
    """
    sets = read_sets(suite) if isinstance(suite, Suite) else suite
    if encoded is None:
        encoded = encode_sets(sets, tokenizer, context_length(model.config.to_dict()), sight)
    job = _Job(model, tokenizer, LikelihoodScorer(model, batch_size, sight=sight), batch_size, sight, progress)
    training = model.training
    model.eval()
    try:
        scores = {}
        for one in sets:
            scores[one.task.name] = job.score(one, encoded[one.task.name], label)
            if done is not None:
                done(one.task.name, scores[one.task.name])
        return scores
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Job:
    model: Any
    tokenizer: PreTrainedTokenizerBase
    likelihood: LikelihoodScorer
    batch_size: int | None
    sight: Sight | None
    progress: Progress

    def score(self, one: TaskSet, encoded: Encoded, label: str) -> TaskScore:
        title = f"{label}: {one.task.name}"
        try:
            if isinstance(one.task, HarnessTask):
                return self._harness(one.task, one, title)
            if isinstance(one.task, TextTask):
                return self._texts(encoded, title)
            if isinstance(one.task, SaidTask):
                return mark(one, self._outputs(one.task, encoded, title))
            return self._choices(one.task, one, encoded, title)
        except UsageError:
            raise
        except NotFiniteError as error:
            raise KtmergeError(
                f"{label}, task '{one.task.name}'{_place(one, encoded, error.number)}: {error}"
            ) from error
        except KtmergeError as error:
            raise KtmergeError(f"{label}, task '{one.task.name}': {error}") from error

    def _harness(self, task: HarnessTask, one: TaskSet, title: str) -> TaskScore:
        if one.harness is None:
            raise UsageError(f"task '{task.name}': read it with read_sets first.")
        return score_harness(
            self.model, self.tokenizer, task, one.harness, self.likelihood,
            batch_size=self.batch_size or answers_at_once(self.model, ANSWERED), progress=self.progress, label=title,
        )  # fmt: skip

    def _choices(self, task: ChoiceTask | ClassifyTask, one: TaskSet, encoded: Encoded, title: str) -> TaskScore:
        sums = self.likelihood.score(encoded.requests, self.progress, title, len(one.items)).logprob
        by_item = [sums[a:b] for a, b in zip(encoded.offsets, encoded.offsets[1:], strict=False)]
        taken = metrics.CHOICE[task.metric]
        items = [item for item in one.items if isinstance(item, ChoiceItem)]
        predicted = [taken(own, item.choices) for own, item in zip(by_item, items, strict=True)]
        scores = [float(found in item.right) for found, item in zip(predicted, items, strict=True)]
        logprobs = [np.round(own, 6).tolist() for own in by_item]
        details: dict[str, list[Any]] = {"logprobs": logprobs, "predicted": predicted}
        figures = {}
        if isinstance(task, ClassifyTask):
            wanted, classes = [item.answer for item in items], len(task.labels)
            figures["macro_f1"] = 100 * metrics.macro_f1(predicted, wanted, classes)
            figures["balanced_accuracy"] = 100 * metrics.balanced_accuracy(predicted, wanted, classes)
        return TaskScore(np.array(scores), details, figures)

    def _outputs(self, task: SaidTask, encoded: Encoded, title: str) -> list[str]:
        length = max(map(len, encoded.prompts)) + task.max_new_tokens
        return generate(
            self.model, self.tokenizer, encoded.prompts, max_new_tokens=task.max_new_tokens, stop=task.stop,
            batch_size=self.batch_size or answers_at_once(self.model, length), views=encoded.views, sight=self.sight,
            progress=self.progress, label=title,
        )  # fmt: skip

    def _texts(self, encoded: Encoded, title: str) -> TaskScore:
        found = self.likelihood.score(encoded.requests, self.progress, title)
        tokens = [len(request.continuation) for request in encoded.requests]
        correct: list[int] = found.correct.tolist()
        scores = [metrics.next_token_accuracy(*pair) for pair in zip(correct, tokens, strict=True)]
        details: dict[str, list[Any]] = {
            "correct": correct, "tokens": tokens, "nll": np.round(-found.logprob, 6).tolist(),
            "bytes": list(encoded.bytes), "words": list(encoded.words),
        }  # fmt: skip
        return TaskScore(np.array(scores), details)


def _place(one: TaskSet, encoded: Encoded, number: int) -> str:
    """Where the row of a request or prompt stands, and which item it is; lm_eval's tasks do not say."""
    if one.harness is not None:
        return ""
    item = bisect_right(encoded.offsets, number) - 1 if encoded.offsets else number
    row = encoded.rows[item]
    return f", {one.places.get(row, f'row {row + 1}')}, item {item + 1}"
