"""Texts that a model writes itself, to be measured on where there is no data of what it was made with."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

import torch

from ktmerge.checkpoints.files import write_whole
from ktmerge.progress import Progress
from ktmerge.recipes.schema import Statistics
from ktmerge.tuners.encode import Encoded, Encoder

_LONGEST = 256
"""Tokens of a text; shorter where the model ends it."""


def generated(job: Statistics, model: Any, encoder: Encoder, kept: Path, progress: Progress) -> list[Encoded]:
    """``job.self_generate`` texts drawn from the model's own distribution, from the token that opens a text on.

    Where no token does, each text begins with one drawn evenly from the vocabulary. Every text has a random stream of
    its own, keyed by seed and number.

    Args:
        job: what is asked for.
        model: of transformers, in evaluation mode.
        encoder: of its tokenizer.
        kept: a file for the texts, so that a run that goes on need not write them again.
        progress: told the texts.
    """
    wanted = job.self_generate or 0
    if kept.exists():
        return [_encoded(ids) for ids in json.loads(kept.read_text(encoding="utf-8"))]
    texts = []
    longest = min(job.max_length, _LONGEST)
    with progress.task("writing texts", wanted, "items") as step:
        for number in range(wanted):
            texts.append(_written(job.seed, number, model, encoder, longest))
            step.advance()
    write_whole(kept, json.dumps(texts))
    return [_encoded(ids) for ids in texts]


def _written(seed: int, number: int, model: Any, encoder: Encoder, longest: int) -> list[int]:
    key = hashlib.blake2b(f"{seed} text {number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    first = encoder.tokenizer.bos_token_id
    if first is None:
        first = int(torch.randint(len(encoder.tokenizer), (1,), generator=generator))
    ids, cache, given = [first], None, [first]
    while len(ids) < longest:
        with torch.no_grad():
            found = model(torch.tensor([given], device=model.device), past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        chances = found.logits[0, -1].double().softmax(-1).cpu()
        given = [int(torch.multinomial(chances, 1, generator=generator))]
        ids += given
        if given[0] in encoder.stops and len(ids) > 2:
            break
    return ids


def _encoded(ids: list[int]) -> Encoded:
    return Encoded(array("i", ids), bytes([0] + [1] * (len(ids) - 1)))
