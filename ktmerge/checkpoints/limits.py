"""Numbers in a checkpoint's configuration: how much its model can take, and whether something is one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def context_length(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model reads, as its config.json says; None where it doesn't."""
    text = config.get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config):
        for key in _KEYS:
            if isinstance(part.get(key), int) and part[key] > 0:
                return int(part[key])
    return None


def is_finite(value: object) -> bool:
    """Whether something out of a JSON file is a number that a float can hold; whole numbers there have no end."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
