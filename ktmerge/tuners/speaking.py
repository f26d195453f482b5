"""What the model writes at every evaluation, in answer to the same few prompts, for a person to read.

Greedy, so that no random number is drawn. Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from ktmerge.progress import Progress
from ktmerge.recipes.images import Image
from ktmerge.tuners.collate import Collator
from ktmerge.tuners.encode import Encoded, Extras
from ktmerge.tuners.loss import for_model
from ktmerge.tuners.mode import evaluating
from ktmerge.tuners.report import SAMPLES

_MOST_TOKENS, _BEYOND = 64, 8
"""Tokens of an answer at most; and beyond those of the expected one."""
_SHOWN = 60
"""Characters of a prompt and of an answer on the terminal."""
_SEPARATORS = {ord(one): f"\\u{ord(one):04x}" for one in "\x85\u2028\u2029"}
"""Line separators of Unicode, which JSON need not escape and readers of lines may stumble over."""


@dataclass(frozen=True)
class Prompt:
    """What comes before the first answer of a sample, and that answer."""

    set: str
    asked: list[int]
    expected: list[int]
    images: tuple[Image, ...] = ()


def choose_prompts(sets: Mapping[str, Sequence[Encoded]], count: int, image_token: int | None = None) -> list[Prompt]:
    """Of every set the first ``count`` samples that ask something, and show nothing (``image_token``) later on."""
    found = []
    for name, samples in sets.items():
        suited = [sample for sample in samples if image_token not in sample.ids[sample.trained.index(1) :]]
        found += [_prompt(name, sample) for sample in suited[:count]]
    return found


def _prompt(name: str, sample: Encoded) -> Prompt:
    first = sample.trained.index(1)
    last = sample.trained.find(0, first)
    expected = list(sample.ids[first : len(sample) if last < 0 else last])
    return Prompt(name, list(sample.ids[:first]), expected, sample.images)


class Speaker(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Has the model answer at every evaluation; appends a line to the log, and shows it.

    Args:
        prompts: what it is asked.
        tokenizer: the model's.
        stops: tokens that end an answer.
        log: lines of JSON.
        progress: where answers are shown.
        extras: what makes the tensors of images.
        room: tokens that the model reads, prompt and answer together; None: any number.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        stops: Sequence[int],
        log: Path,
        progress: Progress,
        extras: Extras | None = None,
        room: int | None = None,
    ) -> None:
        self._extras, self._room = extras, room
        self._prompts, self._tokenizer, self._stops = prompts, tokenizer, list(stops)
        self._log, self._progress = log, progress

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        told = [
            {
                "set": prompt.set,
                "asked": self._text(prompt.asked),
                "expected": self._text(prompt.expected),
                "said": self._text(answer),
            }
            for prompt, answer in zip(self._prompts, self.answers(model), strict=True)
        ]
        with self._log.open("a", encoding="utf-8") as stream:
            line = json.dumps({"step": int(state.global_step), SAMPLES: told}, ensure_ascii=False)
            stream.write(line.translate(_SEPARATORS) + "\n")
        for one in told:
            self._progress.note(f"  {one['set']}: …{_end(one['asked'])} -> {_start(one['said'])}")

    def answers(self, model: Any) -> list[list[int]]:
        """The tokens that the model says after each prompt, one prompt at a time."""
        with evaluating(model), torch.no_grad():
            return [self._answer(model, prompt) for prompt in self._prompts]

    def _answer(self, model: Any, prompt: Prompt) -> list[int]:
        plain: Callable[..., Any] = GenerationConfig
        most = min(_MOST_TOKENS, len(prompt.expected) + _BEYOND)
        how = plain(
            max_new_tokens=most if self._room is None else min(most, self._room - len(prompt.asked)),
            do_sample=False,
            eos_token_id=self._stops,
            pad_token_id=self._stops[0],
        )
        asked = Encoded(array("i", prompt.asked), bytes(len(prompt.asked)), images=prompt.images)
        batch = for_model(Collator(0, extras=self._extras)([asked]))
        given = {name: value.to(model.device) for name, value in batch.items()}
        found = model.generate(**given, generation_config=how)
        said: list[int] = found[0, len(prompt.asked) :].tolist()
        return said

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _end(text: str) -> str:
    return repr(text[-_SHOWN:])[1:-1]


def _start(text: str) -> str:
    return repr(text[:_SHOWN])
