"""Items to tokens: which token ids are given and which are scored. Knows tokenizers, no models."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ktmerge.errors import UsageError
from ktmerge.eval.chunks import even_chunks, word_starts
from ktmerge.eval.fingerprints import prefix
from ktmerge.eval.items import AskedItem, ChoiceItem, Item, SaidItem, Shot, TextItem, whole_prompt
from ktmerge.recipes.suites import AnyTask, ChoiceTask, ClassifyTask, SaidTask, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight, View


@dataclass(frozen=True)
class Request:
    """Score ``continuation`` given ``context``; token ids, neither empty. ``view`` has the context's images, if any."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    view: View | None = None


@dataclass(frozen=True)
class Encoded:
    """The token side of a task.

    Attributes:
        rows: row number of each scored item.
        requests: of choice and text tasks; those of item i are ``requests[offsets[i]:offsets[i + 1]]``.
        offsets: len(items) + 1 positions in ``requests``.
        bytes: of a text task: UTF-8 bytes that each request's continuation stands for.
        words: of a text task: words that begin in these bytes.
        prompts: of a generate or letter task: token ids of each prompt.
        views: of each prompt, its images, or None.
        truncated: items whose context was cut from the left to fit the model.
        skipped: rows of a text task too short to have a scored token.
    """

    rows: list[int]
    requests: list[Request] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    views: list[View | None] = field(default_factory=list)
    truncated: int = 0
    skipped: int = 0


class _RowError(Exception):
    """What is wrong with one row's item, without saying where the row stands."""

    def __init__(self, item: Item, message: str) -> None:
        super().__init__(message)
        self.row = item.row


@contextmanager
def _told_of(item: Item) -> Iterator[None]:
    """Say of which row it is that the block complains."""
    try:
        yield
    except UsageError as error:
        raise _RowError(item, str(error)) from None


class Encoder:
    """Encodes tasks with one tokenizer for models of one context length; prompts with images by their ``sight``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, sight: Sight | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length or 2**31
        self._sight = sight
        self._prefix = prefix(tokenizer)

    def task(self, task: AnyTask, items: Sequence[Item], places: Mapping[int, str] | None = None) -> Encoded:
        """Encode the items of ``task``; ``places`` says where its rows stand, by their numbers.

        Raises:
            UsageError: no chat template where one is needed, or something is too long for the model.
        """
        try:
            if isinstance(task, TextTask):
                return self._texts(task, [item for item in items if isinstance(item, TextItem)])
            if isinstance(task, ChoiceTask | ClassifyTask):
                return self._choices(task, [item for item in items if isinstance(item, ChoiceItem)])
            return self._prompts(task, [item for item in items if isinstance(item, SaidItem)])
        except _RowError as error:
            where = (places or {}).get(error.row, f"row {error.row + 1}")
            raise UsageError(f"task '{task.name}': {where}: {error}") from None
        except UsageError as error:
            raise UsageError(f"task '{task.name}': {error}") from None

    def asked(self, item: AskedItem, chat: bool) -> str:
        """All the model sees of an item, worked examples included: as turns with ``chat``, else one after the other."""
        return self.prompt(item.prompt, True, item.shots) if chat else whole_prompt(item)

    def prompt(self, prompt: str, chat: bool, shots: Sequence[Shot] = ()) -> str:
        """The text the model sees: the prompt, or with ``chat`` a user turn of it and the start of an answer."""
        if not chat:
            return prompt
        if not self._tokenizer.chat_template:
            raise UsageError("chat is set, but the model's tokenizer has no chat template.")
        said = [text for shot in shots for text in (shot.prompt, shot.answer.strip())] + [prompt]
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            return self._rendered(turns, said)
        except (TemplateError, ValueError, TypeError) as error:
            try:  # templates of models that see take a turn apart into texts and images
                return self._rendered(in_parts, said)
            except (TemplateError, ValueError, TypeError):
                raise UsageError(
                    f"the model's chat template cannot render user and assistant turns: {error}."
                ) from None

    def _rendered(self, turns: Any, said: Sequence[str]) -> str:
        written = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if not all(text.strip() in written for text in said):
            raise ValueError("it leaves out what a turn says")
        return str(written)

    def ids(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer itself puts in front of a text (BOS) unless the text starts with it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def pair(self, context: str, continuation: str) -> Request:
        """Split the joint encoding of both texts where the context's own encoding ends.

        Spaces at the end of the context belong to the continuation, whose first token usually starts with one. The same
        tokens as lm_eval's.

        Raises:
            UsageError: the continuation has no tokens.
        """
        cut = len(context.rstrip())
        context, continuation = context[:cut], context[cut:] + continuation
        given = self.ids(context)
        scored = self.ids(context + continuation)[len(given) :]
        if not scored:  # the continuation melted into the context's last token
            scored = self._tokenizer.encode(continuation, add_special_tokens=False, verbose=False)
        if not given:
            given = [self._start_token()]
            scored = scored[1:] if scored[:1] == given else scored
        if not scored:
            raise UsageError(f"the choice {continuation.strip()!r} has no tokens in this model's vocabulary.")
        return Request(tuple(given), tuple(scored))

    def _pair_of(self, item: Item, context: str, continuation: str) -> Request:
        with _told_of(item):
            return self.pair(context, continuation)

    def _choices(self, task: ChoiceTask | ClassifyTask, items: list[ChoiceItem]) -> Encoded:
        requests: list[Request] = []
        offsets = [0]
        truncated = 0
        for item in items:
            if has_images(item):
                requests += self._seen_choices(item, task.chat)
                offsets.append(len(requests))
                continue
            context = self.asked(item, task.chat)
            pairs = [self._pair_of(item, context, continuation) for continuation in item.continuations()]
            longest = max(len(pair.context) + len(pair.continuation) for pair in pairs)
            if longest - 1 > self._max_length:  # the last token is predicted, not read
                pairs = [self._cut(item, pair) for pair in pairs]
                truncated += 1
            requests += pairs
            offsets.append(len(requests))
        return Encoded([item.row for item in items], requests, offsets, truncated=truncated)

    def _seen_choices(self, item: ChoiceItem, chat: bool) -> list[Request]:
        """Images expand the context alone, so a choice's tokens are those that follow it in plain text."""
        whole = self._view(item, chat)
        view = replace(whole, text=whole.text.rstrip())  # the space goes to the continuation, as in ``pair``
        ids = self._seen_ids(item, view)
        bare = self._eyes.ends_a_line(ids) and not view.text.endswith("\n")
        requests = []
        for continuation in item.continuations():
            tokens = self._pair_of(item, whole.text, continuation.lstrip() if bare else continuation).continuation
            self._must_fit(item, len(ids) + len(tokens) - 1)
            requests.append(Request(ids, tokens, view))
        return requests

    def _view(self, item: Item, chat: bool) -> View:
        """What the model sees of an item with images; of a text item, the images alone."""
        with _told_of(item):
            if isinstance(item, TextItem):
                return self._eyes.view((), "", item.images, False)
            return self._eyes.view(item.shots, item.prompt, item.images, chat)

    def _seen_ids(self, item: Item, view: View) -> tuple[int, ...]:
        with _told_of(item):
            return tuple(self._eyes.ids(view))

    @property
    def _eyes(self) -> Sight:
        if self._sight is None:
            raise UsageError("shows images, but the model has no processor that takes them.")
        return self._sight

    def _must_fit(self, item: Item, tokens: int) -> None:
        """Images cannot be cut, so what does not fit is refused."""
        if tokens > self._max_length:
            raise _RowError(item, f"with its images it is {tokens} tokens long, the model reads {self._max_length}.")

    def _cut(self, item: ChoiceItem, pair: Request) -> Request:
        room = self._max_length + 1 - len(pair.continuation)
        if room < 1:
            raise _RowError(
                item, f"a choice is {len(pair.continuation)} tokens long, the model reads {self._max_length}."
            )
        return Request(pair.context[-room:], pair.continuation)

    def _prompts(self, task: SaidTask, items: Sequence[SaidItem]) -> Encoded:
        room = self._max_length - task.max_new_tokens
        if room < 1:
            raise UsageError(
                f"max_new_tokens is {task.max_new_tokens}, the model's whole context is {self._max_length} tokens."
            )
        prompts: list[list[int]] = []
        views: list[View | None] = []
        truncated = 0
        for item in items:
            view: View | None = None
            if has_images(item):
                view = self._view(item, task.chat)
                ids = list(self._seen_ids(item, view))
                self._must_fit(item, len(ids) + task.max_new_tokens)
            else:
                ids = self.ids(self.asked(item, task.chat)) or [self._start_token()]
                truncated += len(ids) > room
            prompts.append(ids[-room:])
            views.append(view)
        return Encoded([item.row for item in items], prompts=prompts, views=views, truncated=truncated)

    def _texts(self, task: TextTask, items: list[TextItem]) -> Encoded:
        if task.chunk_tokens > self._max_length:
            raise UsageError(f"chunk_tokens is {task.chunk_tokens}, the model reads {self._max_length} tokens.")
        rows: list[int] = []
        requests: list[Request] = []
        sizes: list[int] = []
        words: list[int] = []
        skipped = 0
        for item in items:
            ids, ends = self._with_ends(item.text)
            if item.images and ids:  # given the images the first token is predicted too; nothing is cut
                view = self._view(item, False)
                context = self._seen_ids(item, view)
                self._must_fit(item, len(context) + len(ids) - 1)
                rows.append(item.row)
                requests.append(Request(context, tuple(ids), view))
                sizes.append(ends[-1])
                words.append(len(item.text.split()))
                continue
            skipped += len(ids) < 2
            begins = word_starts(item.text)
            for start, stop in even_chunks(len(ids), task.chunk_tokens - len(self._prefix)):
                rows.append(item.row)
                requests.append(Request((*self._prefix, ids[start]), tuple(ids[start + 1 : stop])))
                sizes.append(ends[stop - 1] - ends[start])
                words.append(bisect_left(begins, ends[stop - 1]) - bisect_left(begins, ends[start]))
        if not requests:
            raise UsageError("no row has a text of at least two tokens.")
        return Encoded(rows, requests, list(range(len(requests) + 1)), sizes, words, skipped=skipped)

    def _with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of ``text`` and, for each, the bytes of text up to its end: every byte belongs to one token."""
        if not self._tokenizer.is_fast:
            ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
            return ids, list(accumulate(len(str(self._tokenizer.decode([token])).encode()) for token in ids))
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        before = list(accumulate((len(character.encode("utf-8", "surrogatepass")) for character in text), initial=0))
        return encoding["input_ids"], [before[end] for _, end in encoding["offset_mapping"]]

    def _start_token(self) -> int:
        """What stands before a text that has nothing before it: BOS, else EOS."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UsageError("an empty prompt needs a tokenizer with a BOS or EOS token; this one has neither.")


def has_images(item: Item) -> bool:
    """Whether an item, or a worked example before it, shows images."""
    return bool(item.images) or any(shot.images for shot in getattr(item, "shots", ()))
