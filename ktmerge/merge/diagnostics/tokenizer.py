"""A checkpoint's tokenizer as its files describe it: tokens with their numbers, special tokens, chat template.

Reads JSON and text only; loads no tokenizer library. A vocabulary that is only in a binary file (``tokenizer.model``)
is not read; that the files differ shows nevertheless.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.tokens import content, mapping, read_object, read_text, read_tokens

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What this reads, and their binary kin: their differences are told in words, not file by file."""

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say.

    Attributes:
        tokens: number by token; empty if no file lists them.
        rules: everything but tokens that decides how text is cut, by the file that says it.
        special: the token of each role.
        template: the chat template, by name where there are several; empty if there is none.
        settings: the rest of ``tokenizer_config.json``.
    """

    tokens: dict[str, int]
    rules: dict[str, str]
    special: dict[str, str]
    template: str
    settings: dict[str, Any]

    @classmethod
    def read(cls, root: Path) -> TokenizerFiles:
        """Read what is there; a file that is no JSON counts as absent."""
        whole, config = read_object(root / "tokenizer.json"), read_object(root / "tokenizer_config.json")
        tokens = read_tokens(root)
        model = {key: value for key, value in mapping(whole.get("model")).items() if key != "vocab"}
        rest = {key: whole[key] for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder") if key in whole}
        rules = {"tokenizer.json": json.dumps([_merges(model), rest], sort_keys=True) if whole else ""}
        rules["merges.txt"] = read_text(root / "merges.txt")
        rules = {file: text for file, text in rules.items() if text}
        special = {role: content(config[role]) for role in _ROLES if config.get(role)}
        more = read_object(root / "special_tokens_map.json")
        special = {role: content(more[role]) for role in _ROLES if more.get(role)} | special
        known = {*_ROLES, "chat_template", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"}
        settings = {key: value for key, value in config.items() if key not in known}
        return cls(tokens, rules, special, _template(root, config), settings)


def _merges(model: dict[str, Any]) -> dict[str, Any]:
    """Merges are written as ``"a b"`` or as ``["a", "b"]``, by version of the library."""
    if isinstance(model.get("merges"), list):
        model["merges"] = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in model["merges"]]
    # Written by some versions only, where they say the default.
    return {key: value for key, value in model.items() if value not in (None, False)}


def _template(root: Path, config: Mapping[str, Any]) -> str:
    found = read_text(root / "chat_template.jinja")
    found = found or read_object(root / "chat_template.json").get("chat_template") or config.get("chat_template") or ""
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True)
