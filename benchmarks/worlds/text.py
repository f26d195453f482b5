"""The text world: a Llama of 0.7M parameters that reads English, and experts for scripture, code and film reviews."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worlds import packages
from worlds.world import CALIBRATION, REPORT, SELECT, Scores, World, fit, keep

if TYPE_CHECKING:
    from torch import Tensor

UPSTREAM = ("press", "learned", "fiction")
TASKS = ("scripture", "code", "reviews")
LENGTH = 64
BATCH = 24
ITEMS = {SELECT: {"up": 12, "down": 20}, REPORT: {"up": 24, "down": 40}}
"""Passages of `LENGTH` tokens in each set."""

BASE = {"steps": 1400, "rate": 3e-3}
TUNE = {"steps": 350, "rate": 1e-3}
VOCABULARY = 1024


@cache
def _texts() -> dict[str, list[str]]:
    return {**packages.brown(), "scripture": packages.scripture(), "code": packages.code(),
            "reviews": packages.reviews()}  # fmt: skip


def _split_of(text: str) -> str:
    """One text in eight is for selection, one for the report."""
    number = hashlib.sha256(text.encode()).digest()[0] % 8
    return {0: SELECT, 1: REPORT}.get(number, "train")


@cache
def _tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    sample = [t for name, some in _texts().items() for t in some if _split_of(t) == "train" or name not in UPSTREAM]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (t[:20000] for t in sample), vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False
    )
    return tokenizer


@cache
def _tokens() -> dict[str, dict[str, Any]]:
    """Of every set and split: rows of `LENGTH` + 1 token ids ``[n, LENGTH + 1]``, one text after the other."""
    import torch

    tokenizer = _tokenizer()
    found: dict[str, dict[str, Any]] = {}
    for name, some in _texts().items():
        streams: dict[str, list[int]] = {"train": [], SELECT: [], REPORT: []}
        for text, encoding in zip(some, tokenizer.encode_batch(some), strict=True):
            streams[_split_of(text)] += [0, *encoding.ids]
        found[name] = {
            split: torch.tensor(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)]).view(-1, LENGTH + 1)
            for split, ids in streams.items()
        }
    return found


def _rows(names: Sequence[str]) -> Tensor:
    import torch

    return torch.cat([_tokens()[name]["train"] for name in names])


def _train(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def tuned(model: Any, names: Sequence[str], steps: int, rate: float) -> Any:
        rows = _rows(names)
        order = torch.Generator().manual_seed(seed)

        def batch(step: int) -> Mapping[str, Any]:
            chosen = rows[torch.randint(len(rows), (BATCH,), generator=order)]
            return {"input_ids": chosen, "labels": chosen}

        fit(model, batch, steps, rate)
        return model

    def base() -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        return tuned(LlamaForCausalLM(config), tuple(packages.GENRES), **BASE)

    common = {"seed": seed, "length": LENGTH, "batch": BATCH, "base": BASE}
    keep(folder / "base", base, common)
    for task in TASKS:
        settings = {**common, "task": task, "tune": TUNE}
        keep(folder / task, lambda task=task: tuned(_load(folder / "base"), (task,), **TUNE), settings)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@cache
def _items(name: str, split: str) -> Tensor:
    rows: Tensor = _tokens()[name][split]
    count = ITEMS[split]["up" if name in UPSTREAM else "down"]
    places = np.linspace(0, len(rows) - 1, count).astype(int)  # from all over the split
    return rows[places]


def _score(model: Any, split: str, names: Sequence[str]) -> Scores:
    import torch

    rows = torch.cat([_items(name, split) for name in names])
    with torch.inference_mode():
        guessed = torch.cat(
            [model(input_ids=some[:, :-1], use_cache=False).logits.argmax(-1) for some in rows.split(32)]
        )
    right = 100 * (guessed == rows[:, 1:]).double().mean(-1)
    pieces = right.split([len(_items(name, split)) for name in names])
    return {name: piece.numpy() for name, piece in zip(names, pieces, strict=True)}


def _calibration(name: str) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    import torch

    rows = _rows(tuple(packages.GENRES) if name == "upstream" else (name,))
    answers = torch.ones(LENGTH + 1, dtype=torch.bool)
    answers[0] = False
    for row in rows[np.linspace(0, len(rows) - 1, CALIBRATION).astype(int)]:
        yield {"input_ids": row[None]}, answers


def _as_rows(names: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Passages as texts without a prompt, so that every token is learned, as in `fit`."""
    import torch

    rows = _rows(names)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    texts = _tokenizer().decode_batch(rows[chosen].tolist(), skip_special_tokens=False)
    return [{"prompt": "", "completion": text} for text in texts]


def _dress(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    inner = _tokenizer()._tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    ).save_pretrained(folder)  # fmt: skip


TEXT = World(
    name="text",
    model="a Llama of 0.7M parameters",
    measure="next tokens guessed exactly, percent",
    upstream=UPSTREAM,
    tasks=TASKS,
    train=_train,
    load=_load,
    score=_score,
    items=ITEMS,
    calibration=_calibration,
    sees=False,
    rows=_as_rows,
    dress=_dress,
)
