"""From samples with images to token ids, as a model's own processor makes them, without making pixels of every image.

A processor writes as many tokens for an image as the model will make features of it; how many depends on the sizes of
a sample's images alone. So it is asked once for each combination of sizes, with blank images, and answers are then
found in the expanded text as in any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.layout import read_json
from ktmerge.checkpoints.processor import load_processor
from ktmerge.errors import UsageError, first_line
from ktmerge.recipes.images import Image
from ktmerge.tuners.data import ChatSample, PlainSample, Sample
from ktmerge.tuners.encode import Encoded, Encoder, Extras, SampleError, Turns
from ktmerge.tuners.images.check import Seen
from ktmerge.tuners.images.pixels import Pixels
from ktmerge.tuners.images.places import MARK, Placed, split
from ktmerge.tuners.stops import stop_ids
from ktmerge.tuners.tokens import Run, Tokens

Size = tuple[int, int]
NOMINAL: Size = (64, 64)
"""Of an image that stands for any."""
_REMEMBERED = 4096
"""Combinations of sizes whose tokens are remembered."""
_QUESTION, _ANSWER = "ktmerge question", "ktmerge answer"


class SeeingEncoder(Encoder):
    """Tokenises for one model that sees, by its processor's chat template.

    Args:
        processor: a transformers processor of images and text.
        stops: as for `Encoder`.
        vocabulary: rows of the embedding, or None if unknown; the token of images may lie beyond.
        seen: of every image that will come.

    Raises:
        UsageError: the chat template shows no images.
    """

    def __init__(self, processor: Any, stops: Sequence[int], vocabulary: int | None, seen: Seen) -> None:
        self.processor = processor
        self._seen = seen
        self._token = str(processor.image_token)
        self._token_id = int(processor.tokenizer.convert_tokens_to_ids(self._token))
        self._expand = lru_cache(_REMEMBERED)(self._ask)
        super().__init__(processor.tokenizer, stops, vocabulary)
        self._in_parts = self.has_template and self._wants_parts()

    @classmethod
    def open(cls, base: Path, seen: Seen) -> Encoder:
        """The encoder of the checkpoint folder ``base``.

        Raises:
            UsageError: there is no processor that takes images, or nothing says how a text ends.
        """
        from ktmerge.tuners.images.suffix import SuffixEncoder, takes_suffix

        processor = load_processor(base)
        config = read_json(base / "config.json")
        stops = stop_ids(processor.tokenizer, base, config)
        rows = (config.get("text_config") or {}).get("vocab_size", config.get("vocab_size"))
        kind = SuffixEncoder if takes_suffix(processor) else cls
        return kind(processor, stops, rows if isinstance(rows, int) else None, seen)

    @property
    def image_token(self) -> int | None:
        return self._token_id

    @property
    def extras(self) -> Extras | None:
        return Pixels(self.processor)

    def encode(self, sample: Sample) -> Encoded:
        encoded = super().encode(sample)
        pairs = zip(encoded.ids, encoded.trained, strict=True)
        if any(trained and token == self._token_id for token, trained in pairs):
            raise SampleError(f"its answer has '{self._token}' in it, which stands for an image.")
        return encoded

    def _require_known(self, ids: Sequence[int]) -> None:
        super()._require_known([token for token in ids if token != self._token_id] or [0])

    def _template(self) -> str | None:
        found = self.processor.chat_template
        found = found.get("default") if isinstance(found, Mapping) else found
        return str(found) if found else super()._template()

    def _wants_parts(self) -> bool:
        """Whether the chat template takes contents as lists of parts, or as texts with the token of images in them."""
        for in_parts in (True, False):
            self._in_parts = in_parts
            turns = [
                {"role": "user", "content": self._content([Image(), _QUESTION])},
                {"role": "assistant", "content": self._content([_ANSWER])},
            ]
            try:
                text = self._templated(turns, ask=False)
            except Exception:
                continue
            if _QUESTION in text and _ANSWER in text and text.count(self._token) == 1:
                self._forget_around(text)
                return in_parts
        raise UsageError("the model's chat template shows no images, neither as parts of a message nor in its text.")

    def _forget_around(self, probe: str) -> None:
        """Don't take for a stop what stands around an image."""
        before, _, after = probe.partition(_QUESTION)
        with suppress(SampleError):
            before = self._expanded(before, self._ask((NOMINAL,)))
        self._ends.added -= set(self._ids(before)) - set(self._ids(after)) - set(self.stops)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _content(self, segments: Sequence[str | Image]) -> Any:
        if not self._in_parts:
            return "".join(self._token + "\n" if isinstance(segment, Image) else segment for segment in segments)
        return [
            {"type": "image"} if isinstance(segment, Image) else {"type": "text", "text": segment}
            for segment in segments
        ]

    def _turns(self, sample: ChatSample) -> Turns:
        """Each turn has the texts that its images become in ``expansions``, which templates do not look at."""
        expansions = iter(self._expansions(sample))
        turns = []
        for message in sample.messages:
            content = self._content(split(message.content, message.images))
            own = [next(expansions) for _ in message.images]
            turns.append({"role": message.role, "content": content, "expansions": own})
        return turns

    def _expansions(self, sample: Sample) -> tuple[str, ...]:
        """The text of tokens that each image of a sample becomes."""
        self._require_images(sample)
        if not sample.images:
            return ()
        return self._expand(tuple(self._seen.sizes[image] for image in sample.images))

    def _require_images(self, sample: Sample) -> None:
        """Refuse texts with places for images where there is no image."""
        texts = [sample.prompt] if isinstance(sample, PlainSample) else [one.content for one in sample.messages]
        if not sample.images and any(MARK in text or self._token in text for text in texts):
            raise SampleError(f"its text has a place for an image ({MARK}), but the row names none.")

    def _ask(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """What the processor writes for images of these sizes (width, height) in one sample."""
        found = self._processed(self._token * len(sizes), sizes, return_text_replacement_offsets=True)
        return tuple(str(one["replacement"]) for one in found["text_replacement_offsets"][0])

    def _processed(self, text: str, sizes: Sequence[Size], **settings: Any) -> Any:
        """What the processor makes of a text with blank images."""
        from PIL import Image as Pictures

        blank = [Pictures.new("RGB", size) for size in sizes]
        try:
            return self.processor(text=[text], images=[blank], **settings)
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            shown = ", ".join(f"{width} x {height}" for width, height in sizes)
            raise SampleError(f"the processor refuses images of {shown} pixels: {first_line(error)}") from None

    def _prompt(self, sample: PlainSample) -> str:
        return self._expanded(self._inline(sample.prompt, sample.placed), self._expansions(sample))

    def _inline(self, text: str, placed: Placed) -> str:
        """A text with the token of images where they stand."""
        parts = split(text, placed)
        return "".join(self._token if isinstance(part, Image) else part for part in parts)

    def _render(self, turns: Turns, *, ask: bool = False) -> str:
        expansions = [one for turn in turns for one in turn["expansions"]]
        return self._expanded(self._templated(turns, ask=ask), expansions)

    def _templated(self, turns: Turns, *, ask: bool) -> str:
        found = self.tokenizer.apply_chat_template(
            turns, chat_template=self._template(), tokenize=False, add_generation_prompt=ask
        )
        return str(found)

    def _expanded(self, text: str, expansions: Sequence[str]) -> str:
        """A text with the tokens of every image in place of the one that stands for it."""
        pieces = text.split(self._token)
        if len(pieces) - 1 != len(expansions):
            raise SampleError(
                f"has {len(expansions)} images, but as the model reads it {len(pieces) - 1} ('{self._token}')."
            )
        return "".join(piece + one for piece, one in zip(pieces, [*expansions, ""], strict=True))

    def _tokens(self, text: str) -> Tokens:
        # processors add the token that opens a text where a chat template does not
        bos = self.tokenizer.bos_token
        return Tokens(self.tokenizer, text, add_special_tokens=not (bos and text.startswith(bos)))

    def _follow_marks(self, turns: Turns) -> tuple[list[int], list[Run]] | None:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        template = self._template()
        special = self.tokenizer.special_tokens_map
        (text,), (spans,) = render([turns], chat_template=template, return_assistant_tokens_mask=True, **special)
        expansions = [one for turn in turns for one in turn["expansions"]]
        tokens = self._tokens(self._expanded(text, expansions))
        pieces = text.split(self._token)
        # where the token of each image ends, and how much longer the text is from there on
        ends = [end + len(self._token) * number for number, end in enumerate(accumulate(map(len, pieces[:-1])), 1)]
        longer = [0, *accumulate(len(one) - len(self._token) for one in expansions)]

        def moved(place: int) -> int:
            return place + longer[sum(end <= place for end in ends)]

        runs = [(tokens.before(moved(first)), tokens.up_to(moved(end))) for first, end in spans]
        return (list(tokens.ids), [Run(first, end, end) for first, end in runs]) if runs else None
