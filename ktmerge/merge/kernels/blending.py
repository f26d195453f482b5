"""Blends, from files or from memory: one pass over blocks that stay in the processor's first caches.

A sweep blends the same models over and over, so that base and experts lie in memory and the result belongs into the
parameters of a loaded model; else rows are read from their files, window by window, and lie in memory then. A change
that is a plain weighted sum of one expert's delta is made in a single loop, which waits for memory only.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.arrays import add_squares
from ktmerge.merge.kernels.codes import BLOCK, F32, FINE, GIVEN, INPUT_NOT_FINITE, OVERFLOW, SUM, UNREADABLE, WINDOW
from ktmerge.merge.kernels.combining import clamp, conclude, copy, shrink, take_in
from ktmerge.merge.kernels.compiler import compiled, inlined
from ktmerge.merge.kernels.conversion import EXPONENT, largest, load, store
from ktmerge.merge.kernels.files import fetch_all, rows_at
from ktmerge.merge.kernels.randomness import random_words
from ktmerge.merge.kernels.settling import scale_and_add, settle_base, settle_expert, sum_up
from ktmerge.merge.kernels.transforming import count_kept, steps_at, subtract, transform

_F32 = np.float32
_INFINITY = np.float32(np.inf)
_ALL = 1 << 60
"""Elements of an array that is all memory: addresses are its indices."""


@inlined
def _row(kind, memory32, place, buffer):
    """Elements of a row: where they are, or for another type than fp32 where `_load` puts them."""
    return memory32[place : place + buffer.size] if kind == F32 else buffer


@inlined
def _load(kind, memory16, memory32, place, row):
    """Whether one is not finite."""
    return largest(row) >= EXPONENT if kind == F32 else load(kind, memory16, memory32, place, row)


@compiled
def _one_delta(base, expert, weight, lambda_, merged, out):
    """``theta_0 + lambda w tau`` and its settling, as the functions of `settling` do it step by step."""
    for i in range(out.size):
        own, theirs = base[i], expert[i]
        delta = theirs - own
        scaled = delta * weight * lambda_
        value = own + scaled
        value = theirs if scaled == delta else value
        merged[i] = scaled
        out[i] = own if scaled == _F32(0) else value


@inlined
def _merge(
    memory16, memory32, kinds, places, start, first, steps, combine, counted, rates, fallback, kept, own, theta, delta,
    words, v, share, m,
):  # fmt: skip
    """The merged delta of the elements of the piece from ``first`` on into ``m``; whether an input is not finite.

    ``places`` are the first elements of the piece in base and experts and, if it is given, of the merged delta.
    """
    n = m.size
    for t in range(kept.size):
        d = delta[t][:n]
        other = _row(kinds[t + 1], memory32, places[t + 1] + first, theta[t + 1][:n])
        if _load(kinds[t + 1], memory16, memory32, places[t + 1] + first, other):
            return True
        subtract(other.view(np.float32), own, d)
        transform(steps, d, start + first, t, words)
        if steps[0].size:
            kept[t] += count_kept(d.view(np.uint32))
        take_in(combine, t, d, rates[1][t], v, share, m)
    if combine == GIVEN:
        place = places[kept.size + 1] + first
        copy(memory32[place : place + n].view(np.float32), m)
    else:
        conclude(combine, counted, rates, fallback, delta, v, share, m)
    return False


@compiled
def _blend(
    memory16, memory32, kinds, places, begin, end, start, steps, combine, counted, rates, ends, kind, stochastic,
    round_key, target, out16, out32, out, leave, sums, kept, work,
):  # fmt: skip
    """The elements from ``begin`` to ``end`` of a piece, whose first is ``start`` in its tensor."""
    number = kept.size
    floats = work.view(np.float32)
    theta, delta = work[: number + 1], floats[number + 1 : 2 * number + 1]
    vote, share = floats[2 * number + 1], floats[2 * number + 2]
    merged, values = floats[2 * number + 3], floats[2 * number + 4]
    words, halves = work[2 * number + 5], work[2 * number + 6].view(np.uint16)
    fallback, factor, limit, lambda_ = ends[0], ends[1], ends[2], ends[3]
    plain_sum = combine == SUM and number == 1 and steps[0].size == 0 and factor == _F32(1) and limit == _INFINITY
    single = plain_sum and leave == 0
    # What is stored as it is computed is computed in its place.
    plain = kind == F32 and target == F32
    status = int64(FINE)
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        m = merged[:n]
        own = _row(kinds[0], memory32, places[0] + first, theta[0][:n])
        patterns = out32[out + first : out + first + n] if plain else values[:n].view(np.uint32)
        r = patterns.view(np.float32)
        theta0 = own.view(np.float32)
        if _load(kinds[0], memory16, memory32, places[0] + first, own):
            return int64(INPUT_NOT_FINITE)
        if single:
            other = _row(kinds[1], memory32, places[1] + first, theta[1][:n])
            if _load(kinds[1], memory16, memory32, places[1] + first, other):
                return int64(INPUT_NOT_FINITE)
            _one_delta(theta0, other.view(np.float32), rates[1][0], lambda_, m, r)
        else:
            if _merge(
                memory16, memory32, kinds, places, start, first, steps, combine, counted, rates, fallback, kept, theta0,
                theta, delta, words, vote[:n], share[:n], m,
            ):  # fmt: skip
                return int64(INPUT_NOT_FINITE)
            if factor != _F32(1):
                shrink(m, factor)
            if limit < _INFINITY:
                clamp(m, limit)
            if leave:
                copy(m, memory32[leave + first : leave + first + n].view(np.float32))
            scale_and_add(m, lambda_, theta0, r)
            for t in range(number - 1, -1, -1):
                other = _row(kinds[t + 1], memory32, places[t + 1] + first, theta[t + 1][:n])
                settle_expert(m, other.view(np.float32), theta0, r)
            settle_base(m, theta0, r)
        if plain:
            if largest(patterns) >= EXPONENT:
                status = int64(OVERFLOW)
            sum_up(theta0, m, r, sums)
            continue
        if stochastic:
            random_words(round_key, start + first, n, words)
        narrow = target != F32
        stored = vote[:n].view(np.uint32) if narrow else out32[out + first : out + first + n]
        to16 = out16[out + first : out + first + n] if narrow else halves[:n]
        if store(kind, stochastic, patterns, words[:n], to16, stored, stored):
            status = int64(OVERFLOW)
        sum_up(theta0, m, stored.view(np.float32), sums)
    return status


def direct(
    memory16, memory32, kinds, places, number, count, start, step_count, steps, floors, leasts, spans, tops, keys, cuts,
    factors, combine, counted, rates, ends, kind, stochastic, round_key, target, out, leave, sums, kept, scratch,
):  # fmt: skip
    """Blend ``count`` elements from memory to memory; FINE, INPUT_NOT_FINITE or OVERFLOW.

    As `blend`, but for where things are. ``memory16`` and ``memory32`` are the address 0. ``places`` int64 ``[N + 2]``
    are the first elements of base, experts and, if ``combine`` is GIVEN, of the merged delta before factor, limit and
    lambda in fp32: their addresses divided by the width of their kind; ``out`` likewise is the first element written,
    of the type ``target``: that of ``kind``, or F32 for its values; ``leave`` that of a place for the merged delta, or
    0. ``scratch`` holds ``BLOCK * (2 N + 7)`` words. Nothing is promised of what is written unless it is FINE.
    """
    all16, all32 = carray(memory16, (_ALL,)), carray(memory32, (_ALL,))
    return _blend(
        all16, all32, carray(kinds, (number + 1,)), carray(places, (number + 2,)), 0, count, start,
        steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors), combine, counted,
        carray(rates, (3, number)), carray(ends, (4,)), kind, stochastic, round_key, target, all16, all32, out, leave,
        carray(sums, (4,)), carray(kept, (number,)), carray(scratch, (2 * number + 7, BLOCK)),
    )  # fmt: skip


@inlined
def _room(scratch, number):
    """Blocks to work in, and behind them a place for each row: of any number of experts."""
    blocks = 2 * number + 7
    behind = carray(scratch, (blocks * BLOCK + 2 * number + 2,))[blocks * BLOCK :]
    return carray(scratch, (blocks, BLOCK)), behind.view(np.int64)


@compiled
def _place_rows(kinds, stride, origin, places):
    """Let ``places`` say where element 0 of a piece would lie in rows that begin with its element ``origin``."""
    for row in range(kinds.size):
        places[row] = row * (stride // 4 if kinds[row] == F32 else stride // 2) - origin


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
    ``kept`` int64 ``[N]``, non-zeros after the transforms. ``scratch`` holds ``BLOCK * (2 N + 7) + 2 N + 2`` words.
    """
    raw16, _, own_kinds, own_files, own_places = rows_at(rows16, rows32, stride, number, kinds, files, places)
    all_steps = steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors)
    work, held = _room(scratch, number)
    halves, words = (0, count) if kind == F32 else (count, 0)
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    worst = int64(FINE)
    for begin in range(0, count, window):
        end = min(begin + window, count)
        if fetched and not fetch_all(raw16, own_kinds, own_files, own_places, begin, end - begin):
            return int64(UNREADABLE)
        _place_rows(own_kinds, stride, begin if fetched else 0, held)
        status = _blend(
            carray(rows16, (_ALL,)), carray(rows32, (_ALL,)), own_kinds, held, begin, end, start, all_steps, combine,
            counted, carray(rates, (3, number)), carray(ends, (4,)), kind, stochastic, round_key, kind,
            carray(out16, (halves,)), carray(out32, (words,)), 0, 0, carray(sums, (4,)), carray(kept, (number,)),
            work,
        )  # fmt: skip
        if status == INPUT_NOT_FINITE:
            return status
        worst = max(worst, status)
    return worst


@compiled
def _squares(
    memory16, memory32, kinds, places, begin, end, start, steps, combine, counted, rates, fallback, bins, kept, work
):  # fmt: skip
    number = kept.size
    floats = work.view(np.float32)
    for first in range(begin, end, BLOCK):
        n = min(BLOCK, end - first)
        own, m = _row(kinds[0], memory32, places[0] + first, work[0][:n]), floats[2 * number + 3][:n]
        if _load(kinds[0], memory16, memory32, places[0] + first, own) or _merge(
            memory16, memory32, kinds, places, start, first, steps, combine, counted, rates, fallback, kept,
            own.view(np.float32), work[: number + 1], floats[number + 1 : 2 * number + 1], work[2 * number + 5],
            floats[2 * number + 1][:n], floats[2 * number + 2][:n], m,
        ):  # fmt: skip
            return int64(INPUT_NOT_FINITE)
        add_squares(own, bins[0][0], bins[0][1])
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
    raw16, _, own_kinds, own_files, own_places = rows_at(rows16, rows32, stride, number, kinds, files, places)
    all_steps = steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors)
    work, held = _room(scratch, number)
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    for begin in range(0, count, window):
        end = min(begin + window, count)
        if fetched and not fetch_all(raw16, own_kinds, own_files, own_places, begin, end - begin):
            return int64(UNREADABLE)
        _place_rows(own_kinds, stride, begin if fetched else 0, held)
        status = _squares(
            carray(rows16, (_ALL,)), carray(rows32, (_ALL,)), own_kinds, held, begin, end, start, all_steps, combine,
            counted, carray(rates, (3, number)), fallback, carray(bins, (2, 2, 256)), carray(kept, (number,)), work,
        )  # fmt: skip
        if status != FINE:
            return status
    return int64(FINE)
