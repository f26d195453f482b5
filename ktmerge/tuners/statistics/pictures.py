"""Rows with images as a model's processor gives them to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ktmerge.checkpoints import Checkpoint
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.errors import UsageError, first_line
from ktmerge.progress import Progress
from ktmerge.recipes.rows import listing
from ktmerge.tuners.data import ChatSample, Sample
from ktmerge.tuners.encode import Encoder, SampleError
from ktmerge.tuners.statistics.examples import Example, text_example


class Pictures:
    """Encodes rows with images; of a conversation, its last answer is the answer.

    Args:
        checkpoint: the model, with its processor beside its weights.
        encoder: for rows without images.
        longest: tokens, those of images among them.

    Raises:
        UsageError: there is no processor that takes images.
    """

    def __init__(self, checkpoint: Checkpoint, encoder: Encoder, longest: int) -> None:
        from transformers import AutoProcessor

        loader: Any = AutoProcessor
        try:
            with quiet_transformers():
                self._processor = loader.from_pretrained(
                    checkpoint.root, local_files_only=True, trust_remote_code=False
                )
            self._token = str(self._processor.image_token)
        except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
            raise UsageError(f"{checkpoint.root}: has no processor that takes images: {first_line(error)}") from None
        self._encoder, self._longest = encoder, longest

    def encode(
        self, samples: Sequence[Sample], pictures: Mapping[str, list[Path]], progress: Progress
    ) -> list[Callable[[], Example]]:
        """Makers of all samples that fit; images are read again when an example is asked for.

        Raises:
            UsageError: samples that template or processor refuse, or none is left.
        """
        makers: list[Callable[[], Example]] = []
        problems: list[str] = []
        for sample in samples:
            maker = partial(self._example, sample, pictures.get(sample.where, []))
            try:
                if len(maker().answers) <= self._longest:
                    makers.append(maker)
            except SampleError as error:
                problems.append(f"{sample.where}: {error}")
        if problems:
            raise UsageError(listing(problems))
        if not makers:
            raise UsageError(f"all {len(samples)} samples are longer than {self._longest} tokens; raise max_length.")
        if len(makers) < len(samples):
            left = len(samples) - len(makers)
            progress.note(f"{left} of {len(samples)} samples are longer than {self._longest} tokens and left out.")
        return makers

    def _example(self, sample: Sample, paths: list[Path]) -> Example:
        if not paths:
            return text_example(self._encoder.encode(sample))
        from PIL import Image

        try:
            images = [Image.open(path).convert("RGB") for path in paths]
        except OSError as error:
            raise SampleError(f"an image cannot be read: {first_line(error)}") from None
        prompt, whole = self._texts(sample, len(images))
        try:
            keywords = self._processed(whole, images)
            before = self._processed(prompt, images)["input_ids"][0]
        except (ValueError, TypeError, IndexError) as error:
            raise SampleError(f"the processor refuses it: {first_line(error)}") from None
        ids = keywords["input_ids"][0]
        answers = torch.zeros(len(ids), dtype=torch.bool)
        shared = min(len(before), len(ids))
        differs = (before[:shared] != ids[:shared]).nonzero()
        answers[int(differs[0]) if len(differs) else shared :] = True
        if not bool(answers.any()):
            raise SampleError("has no answer after it is tokenised.")
        return Example(keywords, answers)

    def _processed(self, text: str, images: list[Any]) -> dict[str, torch.Tensor]:
        found = self._processor(text=[text], images=images, return_tensors="pt")
        return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}

    def _texts(self, sample: Sample, images: int) -> tuple[str, str]:
        """The text up to the answer, and the whole; a token stands for each image, before the first question."""
        if not isinstance(sample, ChatSample):
            missing = max(0, images - sample.prompt.count(self._token))
            prompt = self._token * missing + sample.prompt
            return prompt, prompt + sample.completion + str(self._encoder.tokenizer.eos_token or "")
        last = max(number for number, message in enumerate(sample.messages) if message.role == "assistant")
        first = next((n for n, message in enumerate(sample.messages) if message.role == "user"), 0)
        turns = []
        for number, message in enumerate(sample.messages[: last + 1]):
            parts: list[dict[str, str]] = [{"type": "image"}] * images if number == first else []
            text = message.content.replace(self._token, "").strip() if number == first else message.content
            turns.append({"role": message.role, "content": [*parts, {"type": "text", "text": text}]})
        try:
            prompt = self._processor.apply_chat_template(turns[:-1], add_generation_prompt=True)
            return str(prompt), str(self._processor.apply_chat_template(turns))
        except Exception as error:
            raise SampleError(f"the chat template refuses it: {first_line(error)}") from None
