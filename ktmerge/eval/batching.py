"""How much goes through a model at once: as much as is useful on its device and fits into the memory that is free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

USEFUL = {"cpu": 1024, "cuda": 16384}  # tokens of a batch; more does not pay
MOST_SEQUENCES = 512
MOST_ANSWERS = {"cpu": 16, "cuda": 128}  # sequences that are continued together
MOST_LOGITS = 2**26  # entries of the logits of a batch: 256 MiB in fp32
SHARE = 0.25  # of the free memory that each kind of tensor may take
FEWEST = 64  # tokens


@dataclass(frozen=True)
class Limits:
    """Bounds of one forward pass.

    Attributes:
        sequences: rows.
        tokens: rows times the longest, padding included.
        logits: rows of logits.
        kept: tokens of keys and values that are kept for passes with a common beginning.
    """

    sequences: int
    tokens: int
    logits: int
    kept: int


def limits(model: Any, batch_size: int | None) -> Limits:
    """The bounds for a loaded model; ``batch_size`` bounds the rows instead of what is free, None: automatic."""
    config = model.config.get_text_config()
    width = model.dtype.itemsize
    vocabulary = int(config.vocab_size)
    room = SHARE * free_memory(model.device)
    tokens = int(min(USEFUL.get(model.device.type, USEFUL["cpu"]), room / _activations(config, width)))
    scored = int(min(MOST_LOGITS, room / (width + 8)) / vocabulary)
    kept = int(room / _keys_and_values(config, width))
    return Limits(
        sequences=batch_size or MOST_SEQUENCES,
        tokens=max(FEWEST, tokens),
        logits=max(1, scored),
        kept=max(FEWEST, kept),
    )


def answers_at_once(model: Any, length: int) -> int:
    """How many sequences of ``length`` tokens, answer included, are continued together."""
    room = SHARE * free_memory(model.device) / _keys_and_values(model.config.get_text_config(), model.dtype.itemsize)
    return int(max(1, min(MOST_ANSWERS.get(model.device.type, MOST_ANSWERS["cpu"]), room / length)))


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on ``device``: of CUDA's what is free and what torch holds unused; else of the machine's,
    or of what the process's control group may still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    import psutil

    return int(min(psutil.virtual_memory().available, _left_in_group()))


def _left_in_group(folder: Path = Path("/sys/fs/cgroup")) -> float:
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or no bound
        return float("inf")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice, as CUDA or as the processor's allocator says it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def by_length(
    texts: Sequence[Sequence[int]], views: Sequence[Any], sequences: int, tokens: int | None = None
) -> Iterator[list[int]]:
    """Numbers of texts that go together: longest first, with and without images apart.

    Args:
        texts: token ids.
        views: of each text, its images or None.
        sequences: most texts of a batch.
        tokens: most tokens of a batch, padding included; a single text may exceed it.
    """
    for with_images in (True, False):
        own = [i for i, view in enumerate(views) if (view is not None) == with_images]
        order = sorted(own, key=lambda i: (-len(texts[i]), tuple(texts[i])))
        while order:
            room = sequences if tokens is None else min(sequences, tokens // len(texts[order[0]]))
            yield order[: max(1, room)]
            order = order[max(1, room) :]


def padded(texts: Sequence[Sequence[int]], side: Literal["left", "right"], fill: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and mask [rows, longest]. On the left, so that answers start in one column, or on the right."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), fill)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        start = longest - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _activations(config: Any, width: int) -> int:
    """Bytes a token takes at the widest place of a forward pass, generously."""
    hidden = _most(config, "hidden_size", 1)
    return width * (12 * hidden + 4 * _most(config, "intermediate_size", 4 * hidden))


def _keys_and_values(config: Any, width: int) -> int:
    """Bytes of a token's keys and values in all layers; of models that carry a state instead, more than it takes."""
    heads = _most(config, "num_attention_heads", 1)
    size = _most(config, "head_dim", _most(config, "hidden_size", 1) // heads)
    return 2 * width * _most(config, "num_hidden_layers", 1) * _most(config, "num_key_value_heads", heads) * size


def _most(config: Any, name: str, default: int) -> int:
    """A size from a configuration, the largest where every layer has its own; ``default`` where it is not said."""
    value = getattr(config, name, None)
    return int(max(value) if isinstance(value, list | tuple) else value) if value else default
