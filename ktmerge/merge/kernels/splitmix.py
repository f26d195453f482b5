"""SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) as a keyed hash of positions, in torch integer arithmetic.

Element ``i`` gets output number ``i`` of the generator seeded with the key. For one key the outputs of all elements
differ, so a hash decides between any two of them.
"""

from __future__ import annotations

from torch import Tensor

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LOWEST = -(1 << 63)


def hashes(key: int, elements: Tensor) -> Tensor:
    """64-bit hash of each listed element; int64 like ``elements``, to be read as unsigned."""
    z = (elements + 1) * signed(_STEP) + signed(key)  # int64 products and sums wrap modulo 2**64
    z = (z ^ _shifted(z, 30)) * signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * signed(_SECOND)
    return z ^ _shifted(z, 31)


def at_least(values: Tensor, least: int) -> Tensor:
    """Whether each value, read as unsigned, is at least ``least``, which is below 2**64."""
    return (values ^ _LOWEST) >= (signed(least) ^ _LOWEST)


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(values: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left."""
    return (values >> by) & ((1 << (64 - by)) - 1)
