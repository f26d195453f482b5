"""Candidates compared without labels or generation: how far from the base upstream, and from the experts downstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.errors import UsageError
from ktmerge.eval.encode import Encoded
from ktmerge.eval.items import ChoiceItem, GenerateItem, LetterItem
from ktmerge.eval.letters import LETTERS
from ktmerge.eval.sets import TaskSet
from ktmerge.eval.unlabelled import divergence
from ktmerge.recipes.suites import Side
from ktmerge.sweep.rounds import Round

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = tuple[list[int], int]
"""Token ids, and the first one whose prediction counts."""


class Teachers:
    """Base and experts as they are, to measure candidates against.

    An expert is asked about the downstream set that has its name; where a set has no expert's name, all are.

    Args:
        base: the loaded base.
        experts: loaded, by name.
        texts: the items measured on.
        tokenizer: the base's.

    Raises:
        UsageError: a side has no texts.
    """

    def __init__(self, base: Any, experts: Mapping[str, Any], texts: Round, tokenizer: PreTrainedTokenizerBase) -> None:
        self._base, self._experts = base, dict(experts)
        self._texts: dict[tuple[Side, str], list[Text]] = {
            (one.side, one.task.name): _texts(one, texts.encoded[one.task.name], tokenizer)
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
                up.append(_mean(self._base, model, [(ids, 1) for ids, _ in texts]))
            else:
                asked = [self._experts[name]] if name in self._experts else list(self._experts.values())
                down.append(float(np.mean([_mean(expert, model, texts) for expert in asked])))
        return float(np.mean(up)), float(np.mean(down))


def _mean(teacher: Any, model: Any, texts: Sequence[Text]) -> float:
    return float(divergence(teacher, model, [ids for ids, _ in texts], starts=[start for _, start in texts]).mean())


def _texts(one: TaskSet, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The items of a set as prompts with their right answers."""
    found: list[Text] = []
    for i, item in enumerate(one.items):
        if isinstance(item, GenerateItem | LetterItem):
            answer = item.answers[0] if isinstance(item, GenerateItem) else LETTERS[item.answer]
            said = tokenizer.encode(f" {answer.strip()}", add_special_tokens=False)
            prompt = list(encoded.prompts[i])
            found.append((prompt + said, len(prompt)))
        elif isinstance(item, ChoiceItem):
            request = encoded.requests[encoded.offsets[i] + item.answer]
            found.append(([*request.context, *request.continuation], len(request.context)))
    if not found:  # plain text; a row may be several requests
        found = [([*one.context, *one.continuation], 1) for one in encoded.requests]
    if any(len(ids) < 2 for ids, _ in found):
        raise UsageError(
            f"task '{one.task.name}': an item is too short to be measured by divergence; use another screen."
        )
    return found
