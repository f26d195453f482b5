"""Candidates compared without labels or generation: how far from the base upstream, and from the experts downstream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.errors import UsageError
from ktmerge.eval.encode import Encoded
from ktmerge.eval.items import ChoiceItem, GenerateItem, LetterItem
from ktmerge.eval.letters import LETTERS
from ktmerge.eval.sets import TaskSet
from ktmerge.eval.teachers import Texts, prompts, whole
from ktmerge.eval.unlabelled import divergence
from ktmerge.recipes.suites import Side
from ktmerge.sweep.rounds import Round

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight, View


class Teachers:
    """Base and experts as they are, to measure candidates against.

    An expert is asked about the downstream set that has its name; where a set has no expert's name, all are.

    Args:
        base: the loaded base.
        experts: loaded, by name.
        texts: the items measured on.
        tokenizer: the base's.
        sight: prepares the items' images, if they have some.

    Raises:
        UsageError: a side has no texts.
    """

    def __init__(
        self,
        base: Any,
        experts: Mapping[str, Any],
        texts: Round,
        tokenizer: PreTrainedTokenizerBase,
        sight: Sight | None = None,
    ) -> None:
        self._base, self._experts, self._sight = base, dict(experts), sight
        self._texts: dict[tuple[Side, str], Texts] = {
            (one.side, one.task.name): _texts(one, texts.encoded[one.task.name], tokenizer, sight)
            for one in texts.sets
            if one.harness is None
        }
        for side in ("upstream", "downstream"):
            if not any(key[0] == side for key in self._texts):
                raise UsageError(
                    f"--screen divergence: no {side} set has texts to compare models on; lm_eval's have none."
                )

    def distances(self, model: Any) -> tuple[float, float]:
        """Mean KL(base || model) over the upstream sets and mean KL(expert || model) over the downstream ones, nats."""
        up, down = [], []
        for (side, name), texts in self._texts.items():
            if side == "upstream":
                up.append(self._mean(self._base, model, whole(texts, self._sight)))
            else:
                asked = [self._experts[name]] if name in self._experts else list(self._experts.values())
                down.append(float(np.mean([self._mean(expert, model, texts) for expert in asked])))
        return float(np.mean(up)), float(np.mean(down))

    def _mean(self, teacher: Any, model: Any, texts: Texts) -> float:
        found = divergence(teacher, model, texts.ids, starts=texts.starts, views=texts.views, sight=self._sight)
        return float(found.mean())


def _texts(one: TaskSet, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, sight: Sight | None) -> Texts:
    """The items of a set as prompts with their right answers."""
    found: list[tuple[list[int], int, View | None]] = []
    for i, item in enumerate(one.items):
        if isinstance(item, GenerateItem | LetterItem):
            answer = item.answers[0] if isinstance(item, GenerateItem) else LETTERS[item.answer]
            said = tokenizer.encode(f" {answer.strip()}", add_special_tokens=False)
            prompt = list(encoded.prompts[i])
            found.append((prompt + said, len(prompt), encoded.views[i] if encoded.views else None))
        elif isinstance(item, ChoiceItem):
            request = encoded.requests[encoded.offsets[i] + item.answer]
            found.append(([*request.context, *request.continuation], len(request.context), request.view))
    texts = Texts([ids for ids, *_ in found], [start for _, start, _ in found], [view for *_, view in found])
    if not found:  # plain text, or instructions: nothing is the one right answer
        texts = prompts(encoded, sight)
    if any(len(ids) < 2 for ids in texts.ids):
        raise UsageError(
            f"task '{one.task.name}': an item is too short to be measured by divergence; use another screen."
        )
    return texts
