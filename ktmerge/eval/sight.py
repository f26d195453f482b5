"""What a model that sees takes: prompts with images, made by its own processor, padded by us. Loads no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ktmerge.errors import UsageError, first_line
from ktmerge.eval.fingerprints import date_in, prefix
from ktmerge.eval.items import Shot
from ktmerge.eval.prefixes import common
from ktmerge.recipes.images import MARK, Image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Side = Literal["left", "right"]
Part = dict[str, str]


@dataclass(frozen=True, eq=False)
class View:
    """A prompt with images, as the model's processor takes it: the text has the model's own token for each image.

    Two views are never equal, so that prompts of the same words before other images are not taken for one another.
    """

    text: str
    images: tuple[Image, ...]


class Sight:
    """Prepares prompts with images for one model.

    Args:
        processor: the model's, as transformers loads it.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._begins = _begins(self._tokenizer)
        self._place = _place(processor)

    def view(self, shots: Sequence[Shot], prompt: str, images: tuple[Image, ...], chat: bool) -> View:
        """A prompt after worked examples, with all of their images.

        ``<image>`` in a prompt says where an image stands; without any, they stand before it.

        Raises:
            UsageError: more or fewer places than images, or no chat template where one is needed.
        """
        seen = tuple(image for shot in shots for image in shot.images) + images
        if chat:
            turns: list[tuple[str, list[Part]]] = []
            for shot in shots:
                turns += [("user", parts(shot.prompt, len(shot.images))), ("assistant", [_text(shot.answer.strip())])]
            return View(self._rendered([*turns, ("user", parts(prompt, len(images)))]), seen)
        texts = [self._plain(shot.prompt, len(shot.images)) + shot.answer for shot in shots]
        return View("\n\n".join([*texts, self._plain(prompt, len(images))]), seen)

    def ids(self, view: View) -> list[int]:
        """Token ids of a view, every image as many as it takes.

        Raises:
            UsageError: the processor refuses it.
        """
        found: list[int] = self._processed([view])["input_ids"][0].tolist()
        return found

    def ends_a_line(self, ids: Sequence[int]) -> bool:
        """Whether the processor itself ended the prompt with a line break, after which an answer starts bare."""
        return str(self._tokenizer.decode(list(ids[-1:]))).endswith("\n")

    def after_images(self, ids: Sequence[int]) -> int:
        """Where the text goes on after the last image: what stands there is the first word not given by an image."""
        token = self._tokenizer.convert_tokens_to_ids(str(self._processor.image_token))
        return max((place + 1 for place, one in enumerate(ids) if one == token), default=0)

    def inputs(
        self, views: Sequence[View], tokens: Sequence[Sequence[int]], side: Side, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Keyword arguments of the model for a batch of views.

        Args:
            views: the prompts.
            tokens: all token ids of each, those of the view first and then of what follows it. What the processor says
                of each token (its kind, which images it may look at) goes on over the latter as over an answer.
            side: where to pad.
            dtype: of the pixels.

        Raises:
            UsageError: the processor refuses a view.
        """
        found = dict(self._processed(views))
        kind = int(found.pop("labels", None) is not None)  # such processors call a prompt's tokens 0, an answer's 1
        ids, there = found["input_ids"], found["attention_mask"].bool()
        inputs: dict[str, Tensor] = {}
        for name, value in found.items():
            if value.shape[:2] == ids.shape and not name.startswith("pixel"):
                rows = [
                    _continued(name, own[mask], whole, kind)
                    for own, mask, whole in zip(value, there, tokens, strict=True)
                ]
                fill = {"input_ids": self._pad, "token_type_ids": kind}.get(name, 0)
                inputs[name] = _padded(rows, fill, side)
            else:
                inputs[name] = value.to(dtype) if value.is_floating_point() else value
        return inputs

    def fingerprint(self) -> str:
        """sha256 of what decides what a model sees of an image: the processor's settings and its chat template."""
        own = self._processor
        said = [own.image_processor.to_dict(), type(own).__name__, own.chat_template, self._place, self._begins]
        said += [getattr(own, name, None) for name in ("image_seq_len", "image_seq_length", "patch_size")]
        said += date_in(own.chat_template)
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def _pad(self) -> int:
        tokens = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return next((int(token) for token in tokens if token is not None), 0)

    def _plain(self, prompt: str, images: int) -> str:
        said = parts(prompt, images)
        return "".join(self._place if part["type"] == "image" else part["text"] for part in said)

    def _rendered(self, turns: Sequence[tuple[str, list[Part]]]) -> str:
        if not self._processor.chat_template:
            raise UsageError("chat is set, but the model's processor has no chat template.")
        return _render(self._processor, turns)

    def _processed(self, views: Sequence[View]) -> Mapping[str, Any]:
        texts = [view.text if view.text.startswith(self._begins) else self._begins + view.text for view in views]
        try:
            found: Mapping[str, Any] = self._processor(
                text=texts, images=[[image.open() for image in view.images] for view in views], padding=True,
                return_tensors="pt", add_special_tokens=False,
            )  # fmt: skip
        except Exception as error:  # processors raise whatever they like at texts and images that don't fit them
            raise UsageError(f"the model's processor refuses it: {first_line(error)}") from None
        return found


def parts(prompt: str, images: int) -> list[Part]:
    """A prompt as a chat turn's content: its texts and images in order.

    Raises:
        UsageError: it has places for more or fewer images than there are.
    """
    texts = prompt.split(MARK) if images else [prompt]
    places = len(texts) - 1
    if places not in (0, images):
        raise UsageError(f"the prompt has places ({MARK}) for {places} images, the row has {images}.")
    if not places:
        texts = [""] * images + texts
    found: list[Part] = []
    for number, text in enumerate(texts):
        found += [{"type": "image"}] if number else []
        found += [_text(text)] if text else []
    return found


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _continued(name: str, own: Tensor, tokens: Sequence[int], kind: int) -> Tensor:
    """What a tensor with one entry for each token of a view says of ``tokens``, which go on after the view."""
    more = len(tokens) - len(own)
    if name == "input_ids":
        return own.new_tensor(tokens)
    if own.ndim > 1:  # which images a token may look at: the same as the view's last
        rest = own[-1:].expand(more, *own.shape[1:])
    else:
        rest = own.new_full((more,), {"attention_mask": 1, "token_type_ids": kind}.get(name, 0))
    import torch

    return torch.cat([own, rest])


def _padded(rows: Sequence[Tensor], fill: int, side: Side) -> Tensor:
    longest = max(map(len, rows))
    whole = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), fill)
    for number, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        whole[number, start : start + len(row)] = row
    return whole


def _render(processor: Any, turns: Sequence[tuple[str, list[Part]]]) -> str:
    messages = [{"role": role, "content": _trimmed(content)} for role, content in turns]
    try:
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise through jinja, processors as they like
        raise UsageError(f"the model's chat template cannot render turns with images: {first_line(error)}") from None


def _trimmed(content: Sequence[Part]) -> list[Part]:
    """Without the line ends beside images: templates set their own."""
    found = []
    for number, part in enumerate(content):
        text = part.get("text", "")
        if number and content[number - 1]["type"] == "image":
            text = text.lstrip("\n")
        if content[number + 1 : number + 2] and content[number + 1]["type"] == "image":
            text = text.rstrip("\n")
        if part["type"] == "image" or text:
            found.append(part if part["type"] == "image" else _text(text))
    return found


def _begins(tokenizer: Any) -> str:
    """The special tokens that this tokenizer puts in front of a text, written out."""
    return str(tokenizer.decode(prefix(tokenizer)))


def _place(processor: Any) -> str:
    """What stands for an image in a text without chat template: what the template itself writes for one.

    That may be more than the image token, as in ``<|vision_start|><|image_pad|><|vision_end|>``.
    """
    token = str(processor.image_token)
    if not processor.chat_template:
        return token
    try:
        without, seen = (_render(processor, [("user", [*images, _text("x")])]) for images in ([], [{"type": "image"}]))
    except UsageError:
        return token
    begin = common(without, seen)
    end = common(without[begin:][::-1], seen[begin:][::-1])
    written = seen[begin : len(seen) - end].strip()
    return written if written.count(token) == 1 else token
