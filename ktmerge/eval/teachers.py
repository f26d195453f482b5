"""Texts without labels on which a model is held against another one, its teacher: base or expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.eval.batching import answers_at_once
from ktmerge.eval.encode import Encoded, Request
from ktmerge.eval.generate import generate
from ktmerge.eval.likelihood import LikelihoodScorer
from ktmerge.eval.sets import TaskSet
from ktmerge.progress import Progress
from ktmerge.recipes.suites import ChoiceTask, ClassifyTask, SaidTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight, View

LONGEST_ANSWER = 64  # tokens of an expert's own answer
ANY = 0  # a text's last token is only predicted: distributions are compared, so that it may be any


@dataclass(frozen=True)
class Texts:
    """What a set is measured on.

    Attributes:
        ids: token ids of each text.
        starts: the first token of each whose prediction counts.
        views: the images in each, or None.
    """

    ids: list[list[int]]
    starts: list[int]
    views: list[View | None]


def whole(texts: Texts, sight: Sight | None) -> Texts:
    """The same texts, of which all words count; where there are images, all that follow the last of them."""
    pairs = zip(texts.ids, texts.views, strict=True)
    starts = [max(1, sight.after_images(ids)) if view is not None and sight is not None else 1 for ids, view in pairs]
    return Texts(texts.ids, starts, texts.views)


def prompts(encoded: Encoded, sight: Sight | None) -> Texts:
    """The prompts of a set as they are: all their words are predicted, and what comes first after them."""
    asked = _asked(encoded)
    return whole(Texts([ids for ids, _ in asked], [], [view for _, view in asked]), sight)


@dataclass(frozen=True)
class Answerer:
    """A teacher that answers a set's prompts in its own way; no label plays a part.

    Attributes:
        model: loaded.
        tokenizer: the model's.
        sight: prepares images for it.
        batch_size: most sequences in a forward pass, None: what fits.
        progress: where to report to.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    sight: Sight | None
    batch_size: int | None
    progress: Progress

    def texts(self, one: TaskSet, encoded: Encoded, label: str) -> Texts:
        """The prompts of a set with this teacher's answers, whose words count.

        A choice is answered by the likeliest one, everything else greedily; plain text is nobody's answer, and counts
        whole.
        """
        if isinstance(one.task, ChoiceTask | ClassifyTask):
            chosen = self._chosen(encoded, label)
            ids = [[*request.context, *request.continuation] for request in chosen]
            return Texts(ids, [len(request.context) for request in chosen], [request.view for request in chosen])
        if isinstance(one.task, SaidTask):
            answers = self._said(one.task, encoded, label)
            return Texts(
                [prompt + answer for prompt, answer in zip(encoded.prompts, answers, strict=True)],
                [len(prompt) for prompt in encoded.prompts],
                list(encoded.views) or [None] * len(encoded.prompts),
            )
        return prompts(encoded, self.sight)

    def _chosen(self, encoded: Encoded, label: str) -> list[Request]:
        scorer = LikelihoodScorer(self.model, self.batch_size, sight=self.sight)
        sums = scorer.score(encoded.requests, self.progress, label, len(encoded.rows)).logprob
        bounds = zip(encoded.offsets, encoded.offsets[1:], strict=False)
        return [encoded.requests[start + int(np.argmax(sums[start:stop]))] for start, stop in bounds]

    def _said(self, task: SaidTask, encoded: Encoded, label: str) -> list[list[int]]:
        longest = min(task.max_new_tokens, LONGEST_ANSWER)
        room = max(map(len, encoded.prompts)) + longest
        said = generate(
            self.model, self.tokenizer, encoded.prompts, max_new_tokens=longest, stop=task.stop,
            batch_size=self.batch_size or answers_at_once(self.model, room), views=encoded.views, sight=self.sight,
            progress=self.progress, label=label,
        )  # fmt: skip
        return [self.tokenizer.encode(text, add_special_tokens=False) or [ANY] for text in said]


def _asked(encoded: Encoded) -> Sequence[tuple[list[int], View | None]]:
    """All that is given of each item and one token more, which is only predicted; of plain text all there is."""
    if encoded.prompts:
        views = list(encoded.views) or [None] * len(encoded.prompts)
        return [([*prompt, ANY], view) for prompt, view in zip(encoded.prompts, views, strict=True)]
    if encoded.bytes:
        return [([*one.context, *one.continuation], one.view) for one in encoded.requests]
    firsts = [encoded.requests[start] for start in encoded.offsets[:-1]]
    return [([*one.context, ANY], one.view) for one in firsts]
