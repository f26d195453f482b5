"""How the C library hands out memory to a process whose arrays are large and whose threads are many."""

from __future__ import annotations

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
_LARGE = 1 << 20
"""Bytes from which an array has pages of its own, which go back to the system with it."""
_KEPT = 32 << 20
"""Bytes that the one heap keeps for what comes next."""


def share_one_heap() -> None:
    """Have all threads of this process share one heap, and large arrays never lie in it.

    For the main program of a long blend, before its threads begin: otherwise each gets a heap of its own, and in each
    of them the holes that large arrays leave grow with the number of tensors. Nothing happens where the C library is
    not glibc.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _KEPT)):
        mallopt(option, value)
