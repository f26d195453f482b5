"""Keys of the counter-based generator: one 64-bit number per use, expert and tensor. Loads no torch."""

from __future__ import annotations

from hashlib import blake2b

SCHEME = "philox4x32-10, key blake2b-64(seed, purpose, expert, tensor), counter element // 4; drops: element // 8"

LOWER = 0x9E3779B97F4A7C15
"""What the key of a stream is combined with (xor) for the lower halves of its draws."""


def stream_key(seed: int, purpose: str, expert: str, tensor: str) -> int:
    """Key of the random stream for one purpose in one tensor; ``expert`` is empty where all experts share it."""
    digest = blake2b(digest_size=8)
    for field in (str(seed), purpose, expert, tensor):
        data = field.encode("utf-8")
        digest.update(len(data).to_bytes(4, "little") + data)  # lengths keep ("ab", "c") apart from ("a", "bc")
    return int.from_bytes(digest.digest(), "little")
