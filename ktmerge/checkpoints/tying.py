"""Output heads over the vocabulary: which tensor they are, and whether they are tied to the embedding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import BITS

_HEADS = ("lm_head", "embed_out", "output", "output_layer", "decoder", "proj_out")
TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|embeddings)\.weight$")
_PEEK = 1 << 12
"""Elements that are compared to tell two tables apart: those that were never one differ at once."""


def tied_head(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """What `claimed_tie` gives, unless the two differ in their first bytes: transformers then ties nothing either."""
    claimed = claimed_tie(checkpoint)
    return None if claimed is None or _differ(checkpoint, *claimed) else claimed


def claimed_tie(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The output head and its embedding, where both are stored although the config says outright that it ties them."""
    head, table = _head(checkpoint), _table(checkpoint)
    says_nothing = not any(
        isinstance(section, Mapping) and "tie_word_embeddings" in section
        for section in (checkpoint.config, checkpoint.config.get("text_config"))
    )
    if head is None or table is None or says_nothing or not ties(checkpoint.config):
        return None
    return (head, table) if _same(checkpoint, head, table) else None


def settle_heads(base: Checkpoint, other: Checkpoint, mapping: dict[str, str]) -> dict[str, str]:
    """Pair heads that have other names, or that only one side stores; pairs are added to ``mapping``.

    Returns:
        the other's explicit head -> its embedding, where the base ties the two.
    """
    base_head, other_head = _head(base), _head(other)
    base_table, other_table = _table(base), _table(other)
    if base_head is not None and other_head is not None:
        if base_head not in mapping and other_head not in mapping.values():
            mapping[base_head] = other_head  # GPT-NeoX's `embed_out` became `lm_head`
        return {}
    only, others_only = _single(base_head, base_table), _single(other_head, other_table)
    if only is not None and others_only is not None:
        # Of two tied tensors a file may keep the name of either.
        if only not in mapping and others_only not in mapping.values() and ties(base.config) and ties(other.config):
            mapping[only] = others_only
        return {}
    if base_table is None or other_table is None:
        return {}
    if other_head is not None:
        tied = ties(base.config) and _same(other, other_head, other_table)
        return {other_head: other_table} if tied else {}
    # A model saved without any head (`LlamaModel`) ties nothing, whatever its config leaves unsaid.
    others_is_tied = ties(other.config) and not _headless(other.config)
    if base_head is not None and others_is_tied and not _differ(base, base_head, base_table):
        mapping[base_head] = other_table
    return {}


def _head(checkpoint: Checkpoint) -> str | None:
    """The output head over the vocabulary, if it is stored."""
    for name, info in checkpoint.tensors.items():
        owner = name.removesuffix(".weight").rpartition(".")[2]
        if owner in _HEADS and len(info.shape) == 2 and checkpoint.classes[name] == "embed":
            return name
    return None


def _table(checkpoint: Checkpoint) -> str | None:
    """The token embedding, if there is exactly one table that can be it."""
    found = [name for name, info in checkpoint.tensors.items() if TABLE.search(name) and len(info.shape) == 2]
    return found[0] if len(found) == 1 else None


def ties(config: Mapping[str, Any]) -> bool:
    """Whether the config lets the output head be the embedding; unsaid, it does."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", True) if isinstance(text, Mapping) else True
    return config.get("tie_word_embeddings", inner) is not False


def _single(head: str | None, table: str | None) -> str | None:
    return (head or table) if (head is None) != (table is None) else None


def _headless(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith("Model") for name in config.get("architectures") or ())


def _same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    a, b = checkpoint.tensors[first], checkpoint.tensors[second]
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _differ(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors differ in their first bytes; two tables that were never one do."""
    a, b = checkpoint.tensors[first], checkpoint.tensors[second]
    count = min(a.numel, b.numel, _PEEK)
    if a.dtype != b.dtype:
        return True
    found = [bytearray(count * BITS[a.dtype] // 8) for _ in range(2)]
    with checkpoint.reader() as reader:
        for name, target in zip((first, second), found, strict=True):
            reader.read_into(name, 0, memoryview(target))
    return found[0] != found[1]
