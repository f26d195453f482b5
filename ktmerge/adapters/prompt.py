"""Prompts before what the language part of a model that sees is given: vectors, or keys and values of every layer.

PEFT has both for models of text. Around one that sees it puts them before the whole model, which then finds neither its
image tokens nor their positions; here they stand inside, where texts and images are vectors already: the images' own
layout, its positions of several axes and its masks are made as ever, and the prompt comes before all of it.

Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

NAME = "prompt"
"""Of the module inside the language part."""


class _Before(nn.Module):
    """Something before the tokens, and what it did in the pass under way.

    Attributes:
        added: places that are its own.
        lent: the cache is its own, which nobody asked for.
    """

    added: int = 0
    lent: bool = False


class Prompt(_Before):
    """Free vectors ``[tokens, size]`` (prompt tuning, arXiv 2104.08691)."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> Tensor:
        """The vectors ``[tokens, size]``."""
        return self.vectors


class PromptNetwork(Prompt):
    """Vectors from a network of three layers (P-tuning, arXiv 2103.10385), smoother to train than free ones."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__(vectors)
        size = vectors.shape[1]
        maps = [nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)]
        self.network = nn.Sequential(*maps)

    def forward(self) -> Tensor:
        """The vectors ``[tokens, size]``."""
        found: Tensor = self.network(self.vectors)
        return found


class Prefix(_Before):
    """Keys and values ``[layers, 2, heads, tokens, width]`` (prefix tuning, arXiv 2101.00190)."""

    def __init__(self, layers: int, heads: int, tokens: int, width: int) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(layers, 2, heads, tokens, width))

    def fill(self, cache: Any, samples: int, dtype: torch.dtype) -> None:
        """Put them into an empty cache, for each of ``samples``."""
        for layer, pair in enumerate(self.pairs.to(dtype)):
            keys, values = pair.unsqueeze(1).expand(-1, samples, -1, -1, -1)
            cache.update(keys, values, layer)


def attach_prompt(model: Any, kind: str, tokens: int) -> dict[str, Any]:
    """Put a prompt before what the language part of a model is given.

    Args:
        model: a transformers model that sees; changed.
        kind: ``prompt``, of vectors that begin as the embeddings of tokens drawn at random; ``p-tuning``; ``prefix``.
        tokens: its length.

    Returns:
        its shape, as `attach_prompt_of` takes it.
    """
    config, embedding = model.config.get_text_config(), model.get_input_embeddings()
    if kind == "prefix":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        _attach(model, Prefix(config.num_hidden_layers, heads, tokens, width))
        return {"shape": [config.num_hidden_layers, heads, tokens, width]}
    drawn = torch.randint(0, config.vocab_size, (tokens,)).to(embedding.weight.device)
    with torch.no_grad():
        vectors = embedding(drawn).detach().clone().float()
    _attach(model, Prompt(vectors) if kind == "prompt" else PromptNetwork(torch.randn_like(vectors)))
    return {"shape": [tokens, vectors.shape[1]]}


def attach_prompt_of(model: Any, shape: list[int]) -> None:
    """Put a prompt of a shape before what the language part of a model is given, to be filled.

    Raises:
        ValueError: it is no such shape.
    """
    if len(shape) not in (2, 4):
        raise ValueError(f"a prompt has no shape {shape}")
    _attach(model, Prompt(torch.zeros(*shape)) if len(shape) == 2 else Prefix(*shape))


def prompt_tensors(model: Any) -> dict[str, Tensor]:
    """What to save of a prompt: its vectors as they came to be, without a network that made them."""
    decoder = model.get_decoder()
    (name,) = (name for name, module in model.named_modules() if module is decoder)
    prompt = getattr(decoder, NAME)
    if isinstance(prompt, Prefix):
        return {f"{name}.{NAME}.pairs": prompt.pairs.detach()}
    with torch.no_grad():
        return {f"{name}.{NAME}.vectors": prompt().detach().clone()}


def _attach(model: Any, prompt: Prompt | Prefix) -> None:
    decoder = model.get_decoder()
    weight = next(decoder.parameters())
    decoder.add_module(NAME, prompt.to(weight.device, weight.dtype))
    decoder.register_forward_pre_hook(_before, with_kwargs=True)
    decoder.register_forward_hook(_after)
    # with a cache models lay out the tokens that follow by its length, not all of them heeding what is before
    model.generate = partial(model.generate, use_cache=False)


def _before(decoder: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Lengthen what the language part is given: ``inputs_embeds``, mask and positions."""
    prompt = getattr(decoder, NAME)
    given = dict(kwargs)
    prompt.added, prompt.lent = 0, False
    embeds, cache = given["inputs_embeds"], given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        return args, given  # what was kept began with the prompt, and is counted by who kept it
    if isinstance(prompt, Prefix):
        count, rows = prompt.pairs.shape[3], 0
        prompt.lent = cache is None and given.get("use_cache") is False
        given["past_key_values"] = DynamicCache() if cache is None else cache
        prompt.fill(given["past_key_values"], len(embeds), embeds.dtype)
    else:
        vectors = prompt().to(embeds.dtype)
        count = rows = len(vectors)
        given["inputs_embeds"] = torch.cat([vectors.expand(len(embeds), -1, -1), embeds], 1)
        prompt.added = rows
    if given.get("position_ids") is not None:
        given["position_ids"] = _positions(given["position_ids"], count, rows)
    mask = given.get("attention_mask")
    if isinstance(mask, Mapping):
        given["attention_mask"] = {kind: _mask(one, count, rows) for kind, one in mask.items()}
    elif mask is not None:
        given["attention_mask"] = _mask(mask, count, rows)
    return args, given


def _after(decoder: Any, args: Any, outputs: Any) -> Any:
    """Leave the prompt's own places out of what comes out."""
    prompt = getattr(decoder, NAME)
    count = prompt.added
    if prompt.lent:
        outputs.past_key_values = None
    outputs.last_hidden_state = outputs.last_hidden_state[:, count:]
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(one[:, count:] for one in outputs.hidden_states)
    return outputs


def _positions(positions: Tensor, count: int, rows: int) -> Tensor:
    """``[..., tokens]``: those of the prompt, if it has ``rows``, then the others, later by ``count``."""
    first = torch.arange(rows, device=positions.device, dtype=positions.dtype).expand(*positions.shape[:-1], rows)
    return torch.cat([first, positions + count], -1)


def _mask(mask: Tensor | None, count: int, rows: int) -> Tensor | None:
    """A mask of tokens ``[samples, tokens]``, or of who sees whom ``[samples, 1, tokens, tokens]``, with a prompt."""
    if mask is None:
        return None
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(len(mask), count), mask], 1)
    seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    wider = torch.cat([mask.new_full((*mask.shape[:-1], count), seen), mask], -1)
    if not rows:
        return wider
    above = mask.new_full((*mask.shape[:-2], rows, wider.shape[-1]), hidden)
    looks_back = torch.ones(rows, rows, dtype=torch.bool, device=mask.device).tril()
    above[..., :rows] = above[..., :rows].masked_fill(looks_back, seen)
    return torch.cat([above, wider], -2)
