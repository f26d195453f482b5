"""What a search for thresholds wants to know: counts, samples and notes of magnitudes and hashes.

Compiled by numba; see `ktmerge.merge.kernels.compiled`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,attr-defined,operator"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.types import int64

from ktmerge.merge.kernels.codes import BF16, BLOCK, F32, FINE, INPUT_NOT_FINITE, UNREADABLE, WINDOW
from ktmerge.merge.kernels.compiler import compiled, compiled_sums
from ktmerge.merge.kernels.conversion import load
from ktmerge.merge.kernels.files import fetch, fetch_all, rows_at
from ktmerge.merge.kernels.gathering import collect
from ktmerge.merge.kernels.randomness import hash_of
from ktmerge.merge.kernels.scanning import not_finite, scan, scan_delta
from ktmerge.merge.kernels.transforming import steps_at, subtract, transform

_U32, _U64, _F64 = np.uint32, np.uint64, np.float64
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ONE = np.uint32(1)


@compiled
def _count_above(magnitudes, high):
    count = _U32(0)
    for i in range(magnitudes.size):
        count = _U32(count + (_ONE if magnitudes[i] > high else _U32(0)))
    return count


@compiled
def _count_magnitudes(magnitudes, found, low, shift, counts, lows):
    rest = _U32(_U32(_ONE << shift) - _ONE)
    for j in range(found.size):
        inside = _U32(magnitudes[found[j]] - low)
        counts[inside >> shift] += _ONE
        lows[inside >> shift] |= inside & rest


@compiled
def _count_hash(value, low, last, shift, counts):
    """Count a hash in its bin; 1 if it is above all bins, else 0."""
    if value < low:
        return _U32(0)
    inside = value - low
    if inside > last:
        return _ONE
    counts[inside >> shift] += _ONE
    return _U32(0)


@compiled
def _count_hashes(found, key, start, low, last, shift, counts):
    above = _U32(0)
    for j in range(found.size):
        above += _count_hash(hash_of(key, _U64(start) + _U64(found[j])), low, last, shift, counts)
    return above


@compiled
def _magnitudes(delta, out):
    patterns = delta.view(np.uint32)
    for i in range(delta.size):
        out[i] = _U32(patterns[i] & _MAGNITUDE)


@compiled
def _delta(raw16, raw32, kinds, row, first, start, steps, own, other, d, words):
    """One expert's delta after the transforms, elements ``first .. first + d.size`` of the rows, whose first element is
    ``start`` in the tensor; whether one is not finite. ``own`` holds the base's."""
    if load(kinds[row], raw16[row], raw32[row], first, other[: d.size]):
        return True
    subtract(other[: d.size].view(np.float32), own[: d.size].view(np.float32), d)
    transform(steps, d, start + first, row - 1, words)
    return False


@compiled
def _fetch_wanted(raw16, kinds, files, places, wanted, begin, size):
    """The base's elements, and those of the rows that are wanted; False if one cannot be read."""
    whole = fetch(0, raw16, kinds, files, places, begin, size)
    for w in range(wanted.size):
        known = w > 0 and wanted[w] == wanted[w - 1]
        whole = whole and (known or fetch(wanted[w], raw16, kinds, files, places, begin, size))
    return whole


@compiled
def _measure(
    raw16, raw32, kinds, wanted, start, origin, count, steps, searches, counts, lows, own, other, delta, words
):  # fmt: skip
    """``count`` elements of the rows, which begin with element ``origin`` of the piece."""
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        d = delta[:n]
        if load(kinds[0], raw16[0], raw32[0], first, own[:n]):
            return int64(INPUT_NOT_FINITE)
        for w in range(wanted.size):
            known = w > 0 and wanted[w] == wanted[w - 1]
            if not known and _delta(raw16, raw32, kinds, wanted[w], first, start + origin, steps, own, other, d, words):
                return int64(INPUT_NOT_FINITE)
            hashed, floor, key, low = searches[w][0], _U32(searches[w][1]), searches[w][2], searches[w][3]
            last, shift, bins = searches[w][4], searches[w][5], int64(searches[w][6])
            magnitudes = other[:n]
            _magnitudes(d, magnitudes)
            if hashed:
                tied = words[: collect(magnitudes, floor, _U32(0), words)]
                above = _count_hashes(tied, key, start + origin + first, low, last, shift, counts[w])
            else:
                high = low + last
                above = _count_above(magnitudes, _U32(high)) if high < _U64(_MAGNITUDE) else _U32(0)
                near = words[: collect(magnitudes, _U32(low), _U32(last), words)]
                _count_magnitudes(magnitudes, near, _U32(low), _U32(shift), counts[w], lows[w])
            counts[w][bins] += above
    return int64(FINE)


def measure(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, wanted_count, wanted, searches, width, counts, lows, scratch,
):  # fmt: skip
    """Count the keys of some rows' deltas, as they are after the transforms; FINE, INPUT_NOT_FINITE or UNREADABLE.

    ``wanted`` int64 are those rows, one several times in a row if several things of it are to be counted;
    ``searches`` uint64 ``[wanted, 7]`` what to count: hashed, floor, key, low, last, shift, bins.
    The key is the magnitude's pattern, or if ``hashed`` the hash, by ``key``, of the elements whose magnitude is
    ``floor``. Added to: ``counts`` uint32 ``[wanted, width + 1]``, keys in ``[low, low + last]`` by
    ``(key - low) >> shift``, and keys above all that in number ``bins``; ``lows`` uint32 ``[wanted, width]``, the union
    of the bits that magnitudes lose in that shift. ``scratch`` holds ``BLOCK * 4`` words.
    """
    raw16, raw32, own_kinds, own_files, own_places = rows_at(rows16, rows32, stride, number, kinds, files, places)
    all_steps = steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors)
    own_wanted, work = carray(wanted, (wanted_count,)), carray(scratch, (4, BLOCK))
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    for begin in range(0, count, window):
        size = min(window, count - begin)
        if fetched and not _fetch_wanted(raw16, own_kinds, own_files, own_places, own_wanted, begin, size):
            return int64(UNREADABLE)
        status = _measure(
            raw16, raw32, own_kinds, own_wanted, start, begin, size, all_steps,
            carray(searches, (wanted_count, 7)), carray(counts, (wanted_count, width + 1)),
            carray(lows, (wanted_count, width)), work[0], work[1], work[2].view(np.float32), work[3],
        )  # fmt: skip
        if status != FINE:
            return status
    return int64(FINE)


@compiled
def _note(
    raw16, raw32, kinds, wanted, start, origin, count, steps, bounds, places, patterns, taken, above, found, own, other,
    delta, words,
):  # fmt: skip
    """``count`` elements of the rows, which begin with element ``origin`` of the piece."""
    plain = steps[0].size == 0 and kinds[0] == BF16
    for w in range(wanted.size):
        row, low, last = wanted[w], bounds[w][0], bounds[w][1]
        for first in range(0, count, BLOCK):
            d = delta[: min(BLOCK, count - first)]
            room = places[w].size - taken[w]
            if room < d.size:
                taken[w] = int64(places[w].size + 1)
                break
            at, of = places[w][taken[w] :], patterns[w][taken[w] :]
            if plain and kinds[row] == BF16:
                taken[w] += scan(raw16[0], raw16[row], first, low, last, origin, at, of, found, own, other, d)
            elif load(kinds[0], raw16[0], raw32[0], first, own[: d.size]) or _delta(
                raw16, raw32, kinds, row, first, start + origin, steps, own, other, d, words
            ):
                return int64(INPUT_NOT_FINITE)
            else:
                taken[w] += scan_delta(d, low, last, _U32(origin + first), at, of, found)
            if not_finite(found):
                return int64(INPUT_NOT_FINITE)
            above[w] += found[0]
    return int64(FINE)


def note(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, wanted_count, wanted, bounds, capacity, noted, patterns, taken, above, scratch,
):  # fmt: skip
    """Note which magnitudes of some rows' deltas, as they are after the transforms, are in an interval, and count those
    above it; FINE, INPUT_NOT_FINITE or UNREADABLE.

    ``wanted`` int64 are those rows; ``bounds`` uint32 ``[wanted, 2]`` the interval's least and last offset from that.
    ``noted`` and ``patterns``, uint32 ``[wanted, capacity]``, take index in the piece and pattern of up to
    ``capacity - BLOCK``; ``taken`` int64 ``[wanted]`` counts them, and is beyond the capacity where that did not do:
    ``above`` int64 ``[wanted]`` is then too small. ``scratch`` holds ``BLOCK * 4`` words and 2.
    """
    raw16, raw32, own_kinds, own_files, own_places = rows_at(rows16, rows32, stride, number, kinds, files, places)
    all_steps = steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors)
    own_wanted, work = carray(wanted, (wanted_count,)), carray(scratch, (4, BLOCK))
    fetched = own_files[0] >= 0
    window = WINDOW if fetched else count
    for begin in range(0, count, window):
        size = min(window, count - begin)
        if fetched and not _fetch_wanted(raw16, own_kinds, own_files, own_places, own_wanted, begin, size):
            return int64(UNREADABLE)
        status = _note(
            raw16, raw32, own_kinds, own_wanted, start, begin, size, all_steps,
            carray(bounds, (wanted_count, 2)), carray(noted, (wanted_count, capacity)),
            carray(patterns, (wanted_count, capacity)), carray(taken, (wanted_count,)), carray(above, (wanted_count,)),
            carray(scratch, (4 * BLOCK + 2,))[4 * BLOCK :],
            work[0], work[1], work[2].view(np.float32), work[3],
        )  # fmt: skip
        if status != FINE:
            return status
    return int64(FINE)


@compiled
def _sample(raw16, raw32, kinds, start, count, steps, out, own, other, delta, words):
    d = delta[:count]
    if load(kinds[0], raw16[0], raw32[0], 0, own[:count]):
        return True
    for row in range(1, kinds.size):
        if _delta(raw16, raw32, kinds, row, 0, start, steps, own, other, d, words):
            return True
        _magnitudes(d, out[row - 1])
    return False


def sample(
    rows16, rows32, stride, kinds, number, files, places, count, start, step_count, steps, floors, leasts, spans, tops,
    keys, cuts, factors, block_count, blocks, out, scratch,
):  # fmt: skip
    """The magnitude patterns of all experts' deltas in some blocks of up to ``BLOCK`` elements; FINE, INPUT_NOT_FINITE
    or UNREADABLE.

    Blocks of ``count`` elements begin with those of ``blocks``, int64, multiples of 4, counted from ``start``; ``out``
    is uint32 ``[block_count, N, count]``. Rows that do not lie in files hold one block. ``scratch``: ``BLOCK * 4``.
    """
    raw16, raw32, own_kinds, own_files, own_places = rows_at(rows16, rows32, stride, number, kinds, files, places)
    all_steps = steps_at(number, step_count, steps, floors, leasts, spans, tops, keys, cuts, factors)
    work = carray(scratch, (4, BLOCK))
    own_blocks, target = carray(blocks, (block_count,)), carray(out, (block_count, number, count))
    for b in range(block_count):
        if own_files[0] >= 0 and not fetch_all(raw16, own_kinds, own_files, own_places, own_blocks[b], count):
            return int64(UNREADABLE)
        if _sample(
            raw16, raw32, own_kinds, start + own_blocks[b], count, all_steps, target[b], work[0], work[1],
            work[2].view(np.float32), work[3],
        ):  # fmt: skip
            return int64(INPUT_NOT_FINITE)
    return int64(FINE)


@compiled_sums
def _energy(values):
    total = _F64(0)
    for i in range(values.size):
        total += _F64(values[i]) * _F64(values[i])
    return total


@compiled
def _energies(kind, raw16, raw32, count, sums, work):
    for first in range(0, count, BLOCK):
        own = work[: min(BLOCK, count - first)]
        if load(kind, raw16, raw32, first, own):
            return int64(INPUT_NOT_FINITE)
        sums[1] += _energy(own.view(np.float32))
    return int64(FINE)


def energy(rows16, rows32, kind, count, sums, scratch):
    """Add the base's squared norm to ``sums[1]``; FINE or INPUT_NOT_FINITE."""
    halves, words = (0, count) if kind == F32 else (count, 0)
    return _energies(kind, carray(rows16, (halves,)), carray(rows32, (words,)), count, sums, carray(scratch, (BLOCK,)))
