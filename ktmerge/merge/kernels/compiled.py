"""Element-wise blends compiled by numba: one pass over blocks that stay in the processor's first caches.

Equals the torch reference bit for bit: the same operations on fp32 numbers in the same order, each rounded by itself
(no fused multiply-add, no reassociation). Every loop is a function of its own over contiguous arrays, the form that
compiles to vector instructions. The entry points take bare addresses, so that their machine code can be kept on disk
and called without numba (see `ktmerge.merge.kernels.native`); nothing here takes the interpreter's lock.

All entry points read ``rows``: the base's elements and then each expert's, ``stride`` bytes apart, each of its own
``kind``. ``start`` is the index of the first element in its tensor, a multiple of 4. The transforms are
``steps`` codes, TRIM or DROP, with one number per step and expert in ``floors`` and ``leasts`` (the least magnitude
pattern that is kept, and the least hash among those that have just that), ``spans`` and ``tops`` (how many patterns
from the floor on are kept, and the least hash that is not among those that have the last of them; 0: all of them are),
``keys`` (of the random stream), ``cuts`` (random words below are kept) and ``factors`` (of what is kept).

Where the rows lie in files as they are, ``files`` and ``places`` (descriptor, and position of the first element) say so
and the kernels read them by themselves, window by window into ``rows``: what is computed on is then in the second cache
still. A first descriptor below 0 means that ``rows`` holds everything already.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.types import CPointer, float32, float64, int64, uint16, uint32, uint64

from ktmerge.merge.kernels.arrays import add_squares, add_up, products, select, spread, tally, tally_hashes
from ktmerge.merge.kernels.codes import (
    BLOCK,
    F32,
    FINE,
    INPUT_NOT_FINITE,
    OVERFLOW,
    UNREADABLE,
    WINDOW,
)
from ktmerge.merge.kernels.combining import clamp, conclude, shrink, take_in
from ktmerge.merge.kernels.compiler import compiled
from ktmerge.merge.kernels.conversion import load, store
from ktmerge.merge.kernels.counting import energy, measure, note, sample
from ktmerge.merge.kernels.deciding import hash_noted, rank_hashes, rank_noted, sort
from ktmerge.merge.kernels.direct import direct
from ktmerge.merge.kernels.electing import elect
from ktmerge.merge.kernels.files import fetch_all
from ktmerge.merge.kernels.ordering import rank
from ktmerge.merge.kernels.randomness import random_words, words
from ktmerge.merge.kernels.ruling import rule
from ktmerge.merge.kernels.settling import scale_and_add, settle_base, settle_expert, sum_up
from ktmerge.merge.kernels.straight import straight
from ktmerge.merge.kernels.transforming import count_kept, subtract, transform

_U32, _F32 = np.uint32, np.float32
_INFINITY = np.float32(np.inf)


@compiled
def _merge(
    raw16, raw32, kinds, start, first, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, fallback, kept, theta, delta, lanes, words, v, share, m,
):  # fmt: skip
    """The merged delta of the elements of the piece from ``first`` on into ``m``, and base and experts into ``theta``;
    the rows begin with the piece's element ``origin``. Whether an input is not finite."""
    n = m.size
    own = theta[0][:n]
    if load(kinds[0], raw16[0], raw32[0], first - origin, own):
        return True
    for t in range(kept.size):
        d, other = delta[t][:n], theta[t + 1][:n]
        if load(kinds[t + 1], raw16[t + 1], raw32[t + 1], first - origin, other):
            return True
        subtract(other.view(np.float32), own.view(np.float32), d)
        transform(steps, d, start + first, t, floors, leasts, spans, tops, keys, cuts, factors, lanes, words)
        if steps.size:
            kept[t] += count_kept(d.view(np.uint32))
        take_in(combine, t, d, rates[1][t], v, share, m)
    conclude(combine, counted, rates, fallback, delta, v, share, m)
    return False


@compiled
def _blend(
    raw16, raw32, kinds, start, begin, end, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, ends, kind, stochastic, round_key, out16, out32, sums, kept,
    theta, delta, lanes, words, vote, share, merged, values,
):  # fmt: skip
    """The elements from ``begin`` to ``end`` of the piece; the rows begin with its element ``origin``."""
    number = kept.size
    fallback, factor, limit, lambda_ = ends[0], ends[1], ends[2], ends[3]
    status = int64(FINE)
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        m, r = merged[:n], values[:n]
        if _merge(
            raw16, raw32, kinds, start, first, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
            combine, counted, rates, fallback, kept, theta, delta, lanes, words, vote[:n], share[:n], m,
        ):  # fmt: skip
            return int64(INPUT_NOT_FINITE)
        theta0 = theta[0][:n].view(np.float32)
        if factor != _F32(1):
            shrink(m, factor)
        if limit < _INFINITY:
            clamp(m, limit)
        scale_and_add(m, lambda_, theta0, r)
        for t in range(number - 1, -1, -1):
            settle_expert(m, theta[t + 1][:n].view(np.float32), theta0, r)
        settle_base(m, theta0, r)
        if stochastic:
            random_words(round_key, start + first, lanes, words[: (n + 3) // 4 * 4])
        stored = vote[:n].view(np.uint32)
        to16, to32 = out16[first : first + n], out32[first : first + n]
        if store(kind, stochastic, r.view(np.uint32), words[:n], to16, to32, stored):
            status = int64(OVERFLOW)
        sum_up(theta0, m, stored.view(np.float32), sums)
    return status


def blend(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, combine, counted, rates, ends, kind, stochastic, round_key, out16, out32, sums, kept, scratch,
):  # fmt: skip
    """Blend ``count`` elements; FINE, INPUT_NOT_FINITE, OVERFLOW or UNREADABLE.

    ``rates`` are votes, weights and shares, ``[3, N]``. ``combine`` is SUM of weights times deltas; LARGEST, of weights
    times deltas the largest magnitude; or ELECT_*, of those deltas that have the sign of the sum of votes times deltas
    (if ``counted``, times the deltas' signs): the sum of weights times deltas over that of shares, the former alone, or
    the largest. ``ends``, ``[4]``: the vote where that is 0; of the merged delta a factor, a cap on its magnitudes, and
    a last factor.
    The result is stored as ``kind``, rounded to the nearest or stochastically. Added to: ``sums`` fp64 ``[4]``, squared
    norms of merged delta and base, inner product of the former with what was stored, number of changed elements;
    ``kept`` int64 ``[N]``, non-zeros after the transforms. ``scratch`` holds ``BLOCK * (2 N + 7)`` words.
    """
    raw16 = carray(rows16, (number + 1, stride // 2))
    raw32 = carray(rows32, (number + 1, stride // 4))
    own_kinds, own_files, own_places = (
        carray(kinds, (number + 1,)),
        carray(files, (number + 1,)),
        carray(places, (number + 1,)),
    )
    per_step = (step_count, number)
    work = carray(scratch, (2 * number + 7, BLOCK))
    floats = work.view(np.float32)
    halves, words = (0, count) if kind == F32 else (count, 0)
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    worst = int64(FINE)
    for begin in range(0, count, window):
        end = min(begin + window, count)
        origin = begin if fetched else 0
        if fetched and not fetch_all(raw16, own_kinds, own_files, own_places, begin, end - begin):
            return int64(UNREADABLE)
        status = _blend(
            raw16, raw32, own_kinds, start, begin, end, origin,
            carray(steps, (step_count,)), carray(floors, per_step), carray(leasts, per_step), carray(spans, per_step),
            carray(tops, per_step), carray(keys, per_step), carray(cuts, per_step), carray(factors, per_step),
            combine, counted, carray(rates, (3, number)), carray(ends, (4,)), kind, stochastic, round_key,
            carray(out16, (halves,)), carray(out32, (words,)), carray(sums, (4,)), carray(kept, (number,)),
            work[: number + 1], floats[number + 1 : 2 * number + 1], work[2 * number + 1], work[2 * number + 6],
            floats[2 * number + 2], floats[2 * number + 3], floats[2 * number + 4], floats[2 * number + 5],
        )  # fmt: skip
        if status == INPUT_NOT_FINITE:
            return status
        worst = max(worst, status)
    return worst


@compiled
def _squares(
    raw16, raw32, kinds, start, begin, end, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
    combine, counted, rates, fallback, bins, kept, theta, delta, lanes, words, vote, share, merged,
):  # fmt: skip
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        m = merged[:n]
        if _merge(
            raw16, raw32, kinds, start, first, origin, steps, floors, leasts, spans, tops, keys, cuts, factors,
            combine, counted, rates, fallback, kept, theta, delta, lanes, words, vote[:n], share[:n], m,
        ):  # fmt: skip
            return int64(INPUT_NOT_FINITE)
        add_squares(theta[0][:n], bins[0][0], bins[0][1])
        add_squares(m.view(np.uint32), bins[1][0], bins[1][1])
    return int64(FINE)


def squares(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, combine, counted, rates, fallback, bins, kept, scratch,
):  # fmt: skip
    """Add the squares of up to 2**40 elements of base and merged delta to ``bins`` uint64 ``[2, 2, 256]``; FINE,
    INPUT_NOT_FINITE or UNREADABLE.

    By exponent; of the squared 24-bit mantissas first the upper and then the lower 24 bits. Else as `blend`.
    """
    raw16 = carray(rows16, (number + 1, stride // 2))
    raw32 = carray(rows32, (number + 1, stride // 4))
    own_kinds, own_files, own_places = (
        carray(kinds, (number + 1,)),
        carray(files, (number + 1,)),
        carray(places, (number + 1,)),
    )
    per_step = (step_count, number)
    work = carray(scratch, (2 * number + 7, BLOCK))
    floats = work.view(np.float32)
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    for begin in range(0, count, window):
        end = min(begin + window, count)
        origin = begin if fetched else 0
        if fetched and not fetch_all(raw16, own_kinds, own_files, own_places, begin, end - begin):
            return int64(UNREADABLE)
        status = _squares(
            raw16, raw32, own_kinds, start, begin, end, origin,
            carray(steps, (step_count,)), carray(floors, per_step), carray(leasts, per_step), carray(spans, per_step),
            carray(tops, per_step), carray(keys, per_step), carray(cuts, per_step), carray(factors, per_step),
            combine, counted, carray(rates, (3, number)), fallback, carray(bins, (2, 2, 256)), carray(kept, (number,)),
            work[: number + 1], floats[number + 1 : 2 * number + 1], work[2 * number + 1], work[2 * number + 6],
            floats[2 * number + 2], floats[2 * number + 3], floats[2 * number + 4],
        )  # fmt: skip
        if status != FINE:
            return status
    return int64(FINE)


_ROWS = [CPointer(uint16), CPointer(uint32), int64, CPointer(int64), int64]
_MEMORY = [CPointer(uint16), CPointer(uint32)]
_FILES = [CPointer(int64), CPointer(int64)]
_STEPS = [
    int64, CPointer(int64), CPointer(uint32), CPointer(uint64), CPointer(uint32), CPointer(uint64), CPointer(uint64),
    CPointer(uint64), CPointer(float32),
]  # fmt: skip
_COMBINE = [int64, int64, CPointer(float32)]

ENTRIES: dict[str, tuple[Any, Any]] = {
    "blend": (
        blend,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, *_COMBINE, CPointer(float32), int64, int64, uint64,
            CPointer(uint16), CPointer(uint32), CPointer(float64), CPointer(int64), CPointer(uint32),
        ),
    ),
    "elect": (
        elect,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, int64, CPointer(float32), float32, float32, CPointer(uint16),
            CPointer(float64), CPointer(int64), CPointer(uint32),
        ),
    ),
    "direct": (
        direct,
        int64(
            *_MEMORY, CPointer(int64), CPointer(int64), int64, int64, int64, *_STEPS, *_COMBINE, CPointer(float32),
            int64, int64, uint64, int64, int64, int64, CPointer(float64), CPointer(int64), CPointer(uint32),
        ),
    ),
    "straight": (
        straight,
        int64(
            *_MEMORY, CPointer(int64), CPointer(float32), int64, int64, int64, int64, CPointer(int64),
            CPointer(uint32),
        ),
    ),
    "squares": (
        squares,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, *_COMBINE, float32, CPointer(uint64), CPointer(int64),
            CPointer(uint32),
        ),
    ),
    "measure": (
        measure,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, int64, CPointer(int64), CPointer(uint64), int64, CPointer(uint32),
            CPointer(uint32), CPointer(uint32),
        ),
    ),
    "note": (
        note,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, int64, CPointer(int64), CPointer(uint32), int64, CPointer(uint32),
            CPointer(uint32), CPointer(int64), CPointer(int64), CPointer(uint32),
        ),
    ),
    "sample": (
        sample,
        int64(
            *_ROWS, *_FILES, int64, int64, *_STEPS, int64, CPointer(int64), CPointer(uint32), CPointer(uint32),
        ),
    ),
    "sort": (sort, int64(CPointer(uint32), int64, int64, CPointer(uint32), CPointer(uint32))),
    "rank_noted": (
        rank_noted,
        int64(
            CPointer(uint32), int64, int64, uint32, int64, CPointer(uint64), CPointer(int64), CPointer(int64),
        ),
    ),
    "hash_noted": (
        hash_noted,
        int64(CPointer(uint32), CPointer(uint32), int64, uint32, uint64, int64, CPointer(uint64)),
    ),
    "rank_hashes": (rank_hashes, int64(CPointer(uint64), int64, int64, CPointer(int64), CPointer(uint64))),
    "energy": (energy, int64(CPointer(uint16), CPointer(uint32), int64, int64, CPointer(float64), CPointer(uint32))),
    "rank": (
        rank,
        int64(
            CPointer(uint32), CPointer(int64), uint64, int64, int64, CPointer(int64), CPointer(uint64),
            CPointer(uint32), CPointer(uint32),
        ),
    ),
    "spread": (
        spread,
        int64(
            *_MEMORY, CPointer(int64), CPointer(int64), int64, int64, int64, *_STEPS, CPointer(float32),
            CPointer(int64), CPointer(uint32),
        ),
    ),
    "add_up": (add_up, int64(CPointer(uint32), int64, int64, CPointer(uint64))),
    "tally": (tally, int64(CPointer(uint32), int64, uint32, uint32, uint32, int64, CPointer(int64))),
    "tally_hashes": (
        tally_hashes,
        int64(CPointer(uint32), int64, int64, uint32, uint64, uint64, uint64, uint32, int64, CPointer(int64)),
    ),
    "select": (select, int64(CPointer(uint32), int64, int64, uint32, uint64, uint64, CPointer(uint32))),
    "products": (
        products,
        int64(
            CPointer(uint32), CPointer(int64), int64, int64, int64, CPointer(float64), CPointer(int64),
            CPointer(float64),
        ),
    ),
    "rule": (
        rule,
        int64(
            int64, CPointer(float32), int64, int64, CPointer(float64), int64, CPointer(float32), CPointer(float32),
            CPointer(float32),
        ),
    ),
    "words": (words, int64(uint64, int64, int64, CPointer(int64), CPointer(uint32))),
}  # fmt: skip
"""Entry points by name, each with its signature."""
