"""Greedy answers of a loaded model, in padded batches. Whatever the checkpoint says of sampling does not count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ktmerge.errors import KtmergeError
from ktmerge.eval.batching import by_length, out_of_memory, padded
from ktmerge.eval.finite import NotFiniteError
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight, View


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    views: Sequence[View | None] = (),
    sight: Sight | None = None,
    progress: Progress = SILENT,
    label: str = "generate",
) -> list[str]:
    """Continue each prompt (token ids) greedily; return the texts up to end of text or the first stop string.

    ``views`` has the images of each prompt, or None, and ``sight`` prepares them.

    Raises:
        NotFiniteError: the model gives NaN or infinite logits; with the number of a prompt.
        KtmergeError: the device's memory doesn't suffice.
    """
    stops = [text for text in stop if text]
    answers = [""] * len(prompts)
    seen = list(views) or [None] * len(prompts)
    ends = sorted({*end_tokens(model, tokenizer), *_special(tokenizer, stops)})
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    with progress.task(label, len(prompts), "items") as step, torch.inference_mode(), _plain_greedy(model):
        for chosen in by_length(prompts, seen, batch_size):
            asked = [view for i in chosen if (view := seen[i]) is not None]
            tokens = [prompts[i] for i in chosen]
            if asked and sight is not None:
                inputs = sight.inputs(asked, tokens, "left", model.dtype)
            else:
                inputs = padded(tokens, "left", pad)
            try:
                new = _continue(model, tokenizer, inputs, ends, pad, max_new_tokens, stops)
            except NotFiniteError as error:
                raise NotFiniteError(chosen[error.number]) from None
            for i, said in zip(chosen, new, strict=True):
                answers[i] = cut_at(_decode(tokenizer, _before(said, ends)), stops)
            step.advance(len(chosen))
    return answers


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends a text, as the tokenizer, the config and the generation config know it."""
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        found |= set(value if isinstance(value, list) else [value]) - {None}
    return sorted(found)


def _special(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> list[int]:
    """The stop strings that are special tokens: texts are decoded without these, so that only their ids tell."""
    return [number for number, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) in stops]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops`` in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _continue(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    ends: list[int],
    pad: int,
    max_new_tokens: int,
    stops: Sequence[str],
) -> list[list[int]]:
    """New token ids of each prompt; ``inputs`` are padded on the left."""
    longest = inputs["input_ids"].shape[1]
    config = _config(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )
    try:
        output = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            generation_config=config,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([_Stop(tokenizer, stops, longest)] if stops else []),
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise KtmergeError(f"out of memory on {model.device}; choose a smaller batch size.") from error
    new: list[list[int]] = output[:, longest:].tolist()
    return new


class _Finite(LogitsProcessor):
    """Refuses logits of which an argmax would make words without meaning; leaves all others as they are."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        good = torch.isfinite(scores.amax(dim=-1))  # NaN is the largest of whatever it is among
        if not good.all():
            raise NotFiniteError(int((~good).nonzero()[0]))
        return scores


class _Stop(StoppingCriteria):
    """Says which rows have a stop string in what they have generated so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stops, self._prompt = tokenizer, stops, prompt
        # A token stands for at least one byte; one more because some tokenizers drop the first one's space.
        self._window = max(len(stop.encode()) for stop in stops) + 1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tail = input_ids[:, max(self._prompt, input_ids.shape[1] - self._window) :]
        texts = [_decode(self._tokenizer, row) for row in tail.tolist()]
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _config(**settings: Any) -> GenerationConfig:
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


def _before(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    first = min((tokens.index(end) for end in ends if end in tokens), default=len(tokens))
    return tokens[:first]


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def _plain_greedy(model: Any) -> Iterator[None]:
    """Take the checkpoint's generation config away: transformers fills every value we leave open from it."""
    own = model.generation_config
    model.generation_config = _config()
    try:
        yield
    finally:
        model.generation_config = own
