"""From samples to token ids, each with a mark: trained or not. Trained are the answers and the stop token after each.

Over-long samples are dropped and counted, never cut. Knows tokenizers and chat templates, nothing about models.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.layout import read_config
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.errors import UsageError, first_line
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.images import Image
from ktmerge.recipes.rows import listing
from ktmerge.tuners.data import ChatSample, PlainSample, Sample
from ktmerge.tuners.images.places import split
from ktmerge.tuners.stops import Stops, stop_ids
from ktmerge.tuners.tokens import Run, Tokens, runs_of

if TYPE_CHECKING:
    import torch

Turns = list[dict[str, Any]]
"""Messages as chat templates take them: role and content."""
_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Encoded:
    """One sample: token ids, and for each whether the model learns to say it (1) or only reads it (0, as the first).

    ``replayed``: it is an upstream sample among those of the downstream task. ``images``: those it shows, in order;
    their tokens are among the ids.
    """

    ids: array[int]
    trained: bytes
    replayed: bool = False
    images: tuple[Image, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class EncodedSet:
    """The samples that fit, in order, and which of all these are; ``dropped`` were too long."""

    samples: list[Encoded]
    dropped: int
    places: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(map(len, self.samples))

    @property
    def trained_tokens(self) -> int:
        """Tokens that enter the loss."""
        return sum(sum(sample.trained) for sample in self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.samples))

    @property
    def digest(self) -> str:
        """sha256 of all tokens and marks."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little") + sample.ids.tobytes() + sample.trained)
        return digest.hexdigest()


Extras = Callable[[Sequence[Encoded], int], dict[str, "torch.Tensor"]]
"""Makes further tensors of a batch, of samples and the number of tokens they are filled up to."""


class SampleError(Exception):
    """Why one sample cannot be encoded, without saying which."""


def encode_all(
    encoder: Encoder, samples: Sequence[Sample], max_length: int, progress: Progress = SILENT, what: str = "data"
) -> EncodedSet:
    """Encode samples, dropping those of more than ``max_length`` tokens.

    Raises:
        UsageError: samples that the chat template refuses (the first five and their number), or none is left.
    """
    kept: list[Encoded] = []
    places: list[int] = []
    problems: list[str] = []
    shortest: int | None = None
    with progress.task(f"tokenising {what}", len(samples), "items") as step:
        for place, sample in enumerate(samples):
            step.advance()
            try:
                encoded = encoder.encode(sample)
            except SampleError as error:
                problems.append(f"{sample.where}: {error}")
                continue
            shortest = min(shortest or len(encoded), len(encoded))
            if len(encoded) <= max_length:
                kept.append(encoded)
                places.append(place)
    if problems:
        raise UsageError(listing(problems))
    if not kept:
        raise UsageError(
            f"{what}: all {len(samples)} samples are longer than {max_length} tokens (the shortest has {shortest}); "
            "raise max_length as far as the model allows, or give shorter samples."
        )
    return EncodedSet(kept, len(samples) - len(kept), tuple(places))


class Encoder:
    """Tokenises for one model.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: what ends an answer, by the model's own configuration; the first is appended where a text has none.
        vocabulary: rows of the embedding, or None if unknown.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], vocabulary: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._ends = Stops(tokenizer, stop_ids)
        self._vocabulary = vocabulary
        template = self._template()
        self.has_template = template is not None
        self._asks = template is not None and "add_generation_prompt" in template
        self._marks_answers = template is not None and _GENERATION.search(template) is not None

    @classmethod
    def load(cls, base: Path) -> Encoder:
        """The tokenizer of the checkpoint folder ``base``, with the stop tokens of its configuration.

        Raises:
            UsageError: there is no tokenizer, or nothing says how a text ends.
        """
        try:
            with quiet_transformers():
                from transformers import AutoTokenizer

                loader: Any = AutoTokenizer
                tokenizer = loader.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # broken files end in errors of every type
            raise UsageError(f"{base}: its tokenizer cannot be loaded: {first_line(error)}") from None
        config = read_config(base)
        stops = stop_ids(tokenizer, base, config)
        rows = config.get("vocab_size")
        return cls(tokenizer, stops, rows if isinstance(rows, int) else None)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self._ends.ids

    @property
    def extras(self) -> Extras | None:
        """What makes the tensors of a batch that are not its tokens; None: there are none."""
        return None

    @property
    def image_token(self) -> int | None:
        """The token that stands for a piece of an image, of models that see."""
        return None

    @property
    def packs(self) -> bool:
        """Whether texts may share a row of a batch."""
        return True

    def require_template(self, samples: Sequence[Sample]) -> None:
        """Refuse conversations for a model that has no chat template.

        Raises:
            UsageError: there is a conversation among the samples, and no template.
        """
        chat = next((sample for sample in samples if isinstance(sample, ChatSample)), None)
        if chat is not None and not self.has_template:
            raise UsageError(
                f"{chat.where}: is a conversation, but the base model has no chat template. Give prompt-completion "
                "data (prompt and completion as text), or a base model with a template (an instruction-tuned one)."
            )

    def encode(self, sample: Sample) -> Encoded:
        """Tokenise one sample of any length.

        Raises:
            SampleError: the chat template refuses it or does not show its answer, or a token is out of vocabulary.
        """
        if sample.images and self.extras is None:
            raise SampleError("has an image, but the base model takes none.")
        ids, trained = self._plain(sample) if isinstance(sample, PlainSample) else self._chat(sample)
        self._require_known(ids)
        trained[0] = False  # there is nothing before it
        if not any(trained):
            raise SampleError("has no token to learn after it is tokenised.")
        return Encoded(array("i", ids), bytes(trained), images=sample.images)

    def _require_known(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no row for."""
        if self._vocabulary is not None and max(ids) >= self._vocabulary:
            raise SampleError(
                f"has token {max(ids)}, but the model knows only {self._vocabulary}; "
                "the tokenizer is not the model's own."
            )

    def _plain(self, sample: PlainSample) -> tuple[list[int], list[bool]]:
        prompt = self._prompt(sample)
        tokens = Tokens(self.tokenizer, prompt + sample.completion, add_special_tokens=True)
        first = tokens.before(len(prompt))
        ids = list(tokens.ids)
        if not ids or ids[-1] not in self.stops:
            ids.append(self.stops[0])
        return ids, [number >= first for number in range(len(ids))]

    def _chat(self, sample: ChatSample) -> tuple[list[int], list[bool]]:
        earlier = any(message.role == "assistant" for message in sample.messages[: sample.trained_from])
        if self._marks_answers and not earlier:
            marked = self._marked(sample)
            if marked is not None:
                return self._ends.mark(*marked)
        return self._ends.mark(*self._located(sample))

    def _marked(self, sample: ChatSample) -> tuple[list[int], list[Run]] | None:
        """Answers as the template's own marks give them; None where the tokenizer cannot follow them."""
        try:
            found = self._follow_marks(self._turns(sample))
        except ValueError:
            return None
        except SampleError:
            raise
        except Exception as error:
            raise _refusal(error) from None
        answer = next(message for message in reversed(sample.messages) if message.role == "assistant")
        if _shown(answer.content, self._render(self._turns(sample)), 0) is None:
            raise SampleError("the chat template does not show its last answer.")
        return found

    def _follow_marks(self, turns: Turns) -> tuple[list[int], list[Run]] | None:
        found = self.tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        runs = runs_of(found["assistant_masks"])
        return (list(found["input_ids"]), [Run(first, end, end) for first, end in runs]) if runs else None

    def _located(self, sample: ChatSample) -> tuple[list[int], list[Run]]:
        """Answers found by rendering the conversation up to each."""
        turns = self._turns(sample)
        try:
            text = self._render(turns)
        except SampleError:
            raise
        except Exception as error:
            raise _refusal(error) from None
        tokens = self._tokens(text)
        runs = []
        position = 0
        for number, message in enumerate(sample.messages):
            if message.role != "assistant" or number < sample.trained_from:
                for part in split(message.content, message.images):
                    position = _after(text, part, position) if isinstance(part, str) else position
                continue
            start, content_end, end = self._locate(turns, message.content, number, text, position)
            runs.append(Run(tokens.before(start), tokens.up_to(content_end), tokens.up_to(end)))
            position = end
        return list(tokens.ids), runs

    def _locate(self, turns: Turns, answer: str, number: int, text: str, position: int) -> tuple[int, int, int]:
        """Where in ``text`` the answer in turn ``number`` starts, its content ends, and its turn ends."""
        before = self._prefix(turns[:number], text, ask=True)
        reached = max(position, len(before) if before is not None else 0)
        content = _shown(answer, text, reached)
        if content is None:
            raise SampleError(f"the chat template does not show the answer of turn {number + 1}.")
        # without a prompt for the answer, what opens the turn still stands before it
        start = reached if before is not None and self._asks else text.find(content, reached)
        content_end = text.find(content, start) + len(content)
        whole = text if number + 1 == len(turns) else self._prefix(turns[: number + 1], text, ask=False)
        return start, content_end, max(content_end, len(whole) if whole is not None else 0)

    def _prefix(self, turns: Turns, text: str, *, ask: bool) -> str | None:
        """The rendering of the first turns, if ``text`` starts with it; templates may refuse or rewrite such a part."""
        try:
            rendered = self._render(turns, ask=ask)
        except Exception:
            return None
        return rendered if text.startswith(rendered) else None

    # What models that see do otherwise: see `ktmerge.tuners.images.encode`.

    def _template(self) -> str | None:
        """The chat template, if there is one."""
        try:
            return str(self.tokenizer.get_chat_template())
        except (ValueError, AttributeError):
            return None

    def _prompt(self, sample: PlainSample) -> str:
        """What a text that goes on begins with."""
        return sample.prompt

    def _turns(self, sample: ChatSample) -> Turns:
        """A conversation as chat templates take it."""
        return [{"role": message.role, "content": message.content} for message in sample.messages]

    def _render(self, turns: Turns, *, ask: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))

    def _tokens(self, text: str) -> Tokens:
        """The tokens of a rendered conversation."""
        return Tokens(self.tokenizer, text, add_special_tokens=False)


def _shown(content: str, text: str, position: int) -> str | None:
    """The part of an answer that stands in ``text``: all of it, or what follows its thoughts, which templates drop."""
    candidates = (content.strip(), content.rpartition("</think>")[2].strip())
    return next((one for one in candidates if one and text.find(one, position) >= 0), None)


def _after(text: str, content: str, position: int) -> int:
    """The position after ``content``, if it stands in ``text`` from ``position`` on."""
    found = text.find(content.strip(), position)
    return found + len(content.strip()) if found >= 0 else position


def _refusal(error: Exception) -> SampleError:
    return SampleError(f"the chat template refuses it: {first_line(error)}")
