"""What a tokenizer does to a text, beyond its words: which files mean the same, and what it puts in front."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight


def fingerprint(tokenizer: PreTrainedTokenizerBase, sight: Sight | None = None) -> str:
    """sha256 of what decides how a text is encoded: vocabulary, rules, special tokens, chat template; and an image."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules: Any = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _STATE}
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    seen = [] if sight is None else [sight.fingerprint()]
    seen += date_in(tokenizer.chat_template)
    text = json.dumps([rules, special, tokenizer.chat_template, *seen], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


_STATE = ("padding", "truncation")  # of the last call, not of the tokenizer


def date_in(template: Any) -> list[str]:
    """Today, if a chat template writes it into every prompt, as Llama's do: other days' prompts are others."""
    return [date.today().isoformat()] if "strftime_now" in str(template) else []


def prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens a tokenizer puts in front of a text. One that it puts behind would end it, and is left out."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts else []
