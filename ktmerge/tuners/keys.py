"""Seeds of random numbers, one for each use: the same wherever and whenever they are asked for. Loads no torch."""

from __future__ import annotations

from hashlib import blake2b


def keyed(seed: int, *words: str) -> int:
    """A number below 2**63 for the use of randomness that the words name."""
    text = "\0".join((str(seed), *words)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1
