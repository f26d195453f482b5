"""How much goes through a model at once: as much as is useful on its device and fits into the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def _activations(config: Any, width: int) -> int:
    """Bytes a token takes at the widest place of a forward pass, generously."""
    hidden = int(config.hidden_size)
    return width * (12 * hidden + 4 * int(getattr(config, "intermediate_size", None) or 4 * hidden))


def _keys_and_values(config: Any, width: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * width * int(config.num_hidden_layers) * int(getattr(config, "num_key_value_heads", None) or heads) * size
