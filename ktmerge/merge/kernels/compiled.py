"""The entry points of the compiled kernels, which see elements of blocks that stay in the processor's first caches.

Equals the torch reference bit for bit: the same operations on fp32 numbers in the same order, each rounded by itself
(no fused multiply-add, no reassociation). Compiled by numba; every loop is a function of its own over contiguous
arrays, the form that compiles to vector instructions. The entry points take bare addresses, so that their machine code
can be kept on disk and called without numba (see `ktmerge.merge.kernels.native`); nothing here takes the interpreter's
lock.

All entry points read ``rows``: the base's elements and then each expert's, ``stride`` bytes apart, each of its own
``kind``. ``start`` is the index of the first element in its tensor, a multiple of 8. The transforms are
``steps`` codes, TRIM or DROP, with one number per step and expert in ``floors`` and ``leasts`` (the least magnitude
pattern that is kept, and the least hash among those that have just that), ``spans`` and ``tops`` (how many patterns
from the floor on are kept, and the least hash that is not among those that have the last of them; 0: all of them are),
``keys`` (of the random stream), ``cuts`` (random words below are kept) and ``factors`` (of what is kept).

Where the rows lie in files as they are, ``files`` and ``places`` (descriptor, and position of the first element) say so
and the kernels read them by themselves, window by window into ``rows``: what is computed on is then in the second cache
still. A first descriptor below 0 means that ``rows`` holds everything already.
"""

# mypy: disable-error-code="attr-defined"

from __future__ import annotations

from typing import Any

from numba.types import CPointer, float32, float64, int64, uint16, uint32, uint64

from ktmerge.merge.kernels.arrays import add_up, products, select, spread, tally, tally_hashes
from ktmerge.merge.kernels.blending import blend, direct, squares
from ktmerge.merge.kernels.codes import SIGNATURES
from ktmerge.merge.kernels.counting import energy, measure, note, sample
from ktmerge.merge.kernels.deciding import hash_noted, rank_hashes, rank_noted
from ktmerge.merge.kernels.electing import elect
from ktmerge.merge.kernels.multi_tensor import multi_tensor
from ktmerge.merge.kernels.ordering import rank
from ktmerge.merge.kernels.randomness import words
from ktmerge.merge.kernels.ruling import rule

_TYPES = {
    "i": int64, "w": uint32, "l": uint64, "f": float32, "I": CPointer(int64), "H": CPointer(uint16),
    "W": CPointer(uint32), "L": CPointer(uint64), "F": CPointer(float32), "D": CPointer(float64),
}  # fmt: skip

ENTRIES: dict[str, Any] = {
    function.__name__: function
    for function in (
        add_up, blend, direct, elect, energy, hash_noted, measure, multi_tensor, note, products, rank, rank_hashes,
        rank_noted, rule, sample, select, spread, squares, tally, tally_hashes, words,
    )
}  # fmt: skip
"""Entry points by name."""


def signature(name: str) -> Any:
    """That of an entry point, as numba has it."""
    return int64(*(_TYPES[letter] for letter in SIGNATURES[name]))
