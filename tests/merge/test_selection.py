"""What a search notes, and what it decides among that, against numpy on whole arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ktmerge.merge import selection
from ktmerge.merge.kernels.codes import BF16, F32
from ktmerge.merge.kernels.native import Native, native
from ktmerge.merge.kernels.search import Interval, Search
from ktmerge.merge.kernels.splitmix import hashes
from ktmerge.merge.program import Trim
from ktmerge.merge.selection import Notes
from ktmerge.merge.steps import Steps
from ktmerge.merge.workspace import Noted, Row, Workspace

SIZE = 40_003
"""Odd, and more than a window of the kernels."""


class Memory:
    """A reader of one row that lies in no file."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values = values

    def place(self, name: str) -> None:
        return None

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        width = self._values.itemsize
        target[:] = memoryview(self._values).cast("B")[start * width : start * width + len(target)]


@pytest.fixture(scope="module")
def kernels() -> Native:
    found = native()
    if found is None:
        pytest.skip("there are no compiled kernels here")
    return found


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (values.astype(np.uint32) << 16).view(np.float32)


def magnitudes(base: np.ndarray[Any, Any], expert: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (widened(expert) - widened(base)).view(np.uint32) & 0x7FFFFFFF


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    base = random.standard_normal(SIZE) * 0.02
    return bf16(base), bf16(widened(bf16(base)) + random.standard_normal(SIZE) * 1e-3)


def held(kernels: Native, rows: Sequence[np.ndarray[Any, Any]], kind: int) -> tuple[Workspace, Steps]:
    space = Workspace(kernels, len(rows) - 1)
    space.hold([Row(Memory(row), "row", kind) for row in rows], 0, rows[0].size)  # type: ignore[arg-type]
    return space, Steps([Trim(0.2, "tensor", "trim")], ["a"] * (len(rows) - 1), 0, "weight")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bounds", [(0.5, 0.7), (0.0, 1.0), (0.999, 1.0)])
def test_notes_what_is_in_an_interval(
    kernels: Native, pair: tuple[np.ndarray[Any, Any], ...], bounds: tuple[float, float], wide: bool
) -> None:
    wanted = magnitudes(*pair)
    low, high = (int(edge) for edge in np.quantile(wanted, bounds))
    rows = [widened(row) for row in pair] if wide else pair
    space, steps = held(kernels, rows, F32 if wide else BF16)
    found = space.note(steps, 0, [(0, Interval(low, 0, high - low + 1), 1.0)])
    assert found is not None
    assert found[0] is not None
    inside = ((wanted >= low) & (wanted <= high)).nonzero()[0]
    assert np.array_equal(found[0].places, inside)
    assert np.array_equal(found[0].patterns, wanted[inside])
    assert found[0].above == (wanted > high).sum()


def test_too_many_to_note_are_said_to_be(kernels: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktmerge.merge.workspace._NOTED", 8)
    rows = [np.zeros(SIZE, np.uint16)] * 3
    space, steps = held(kernels, rows, BF16)
    everything, nothing = Interval(0, 0, 1), Interval(1, 0, 1)
    found = space.note(steps, 0, [(0, everything, 1e-4), (1, nothing, 1e-4)])
    assert found is not None
    assert found[0] is None
    assert found[1] is not None
    assert found[1].places.size == 0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("place", [5, SIZE - 1])
def test_what_is_not_finite_is_seen(
    kernels: Native, pair: tuple[np.ndarray[Any, Any], ...], value: float, row: int, place: int
) -> None:
    rows = [values.copy() for values in pair]
    rows[row][place] = bf16(np.array([value]))[0]
    space, steps = held(kernels, rows, BF16)
    assert space.note(steps, 0, [(0, Interval(0, 0, 1), 0.1)]) is None
    assert space.sample(steps, 0, [0]) is None or place == SIZE - 1


def test_samples_are_the_deltas_of_all_experts(kernels: Native, pair: tuple[np.ndarray[Any, Any], ...]) -> None:
    base, expert = pair
    space, steps = held(kernels, [base, expert, base], BF16)
    space.hold(space._wanted, 0, 1000)
    found = space.sample(steps, 0, [8, 4000])
    assert found is not None
    wanted = magnitudes(base, expert)
    assert np.array_equal(found[0], [wanted[8:1008], wanted[4000:5000]])
    assert not found[1].any()


@pytest.mark.parametrize("most", [2, 64, 1 << 20])
@pytest.mark.parametrize("bits", [0, 1, 20, 31])
@pytest.mark.parametrize("size", [1, 2, 50_000])
def test_says_how_patterns_are_distributed(kernels: Native, size: int, bits: int, most: int) -> None:
    generator = np.random.default_rng(size)
    patterns = generator.integers(0, 1 << bits, size, np.uint32)
    patterns[generator.random(size) < 0.1] = 0
    found = selection.distribution(patterns, Workspace(kernels, 3)).thinned(most)
    assert found.size == size
    assert found.edges.size <= max(most, 4) or most > 1 << 14
    assert found.edges[0] == 0
    assert found.edges[-1] == patterns.max() + 1
    np.testing.assert_array_equal(found.below, np.sort(patterns).searchsorted(found.edges))


@pytest.mark.parametrize("keep", [1, 100, 10_000, 25_000, 49_999])
@pytest.mark.parametrize("most", [32, 512, 1 << 20])
def test_looks_near_the_threshold_of_a_sample(kernels: Native, keep: int, most: int) -> None:
    """Within six standard deviations, and what the bins of a whole sample add to that."""
    patterns = np.abs(np.random.default_rng(keep).standard_normal(50_000).astype(np.float32)).view(np.uint32)
    sample = selection.distribution(patterns, Workspace(kernels, 1)).thinned(most)
    search = Search(keep, patterns.size)
    search.hint(sample.edges, sample.below, sample.size)
    inside = (patterns >= search.interval.low) & (patterns <= search.interval.low + search.interval.last)
    assert inside[np.argsort(patterns)[-keep]]
    share = keep / patterns.size
    reach = 2 * (6 * (patterns.size * share * (1 - share)) ** 0.5 + 2)
    assert inside.sum() <= reach * 1.1 + patterns.size * (2 / most + 2 / 512)
    assert abs(search.expected - inside.sum()) <= patterns.size * 2 / 512


@pytest.mark.parametrize("keep", [1, 7, 500, 7999, 8000, 9999])
@pytest.mark.parametrize("values", [3, 400, 1 << 30])
def test_decides_as_a_sort_by_magnitude_and_hash(kernels: Native, keep: int, values: int) -> None:
    import torch

    random = np.random.default_rng(keep + values)
    patterns = random.integers(0 if values > 3 else 1, values, 10_000, np.uint32)
    keys = hashes(11, torch.arange(10_000)).numpy().view(np.uint64)
    best = np.lexsort((keys, patterns))[::-1][:keep]
    search = Search(keep, patterns.size)
    notes = Notes(search, 0)
    for start in range(0, 10_000, 2500):
        piece = patterns[start : start + 2500]
        notes.add(Noted(np.arange(2500, dtype=np.uint32), piece.copy(), start, 11, 0))
    notes.decide(Workspace(kernels, 1))
    assert search.done
    found = search.result()
    kept = (patterns > found.floor) | ((patterns == found.floor) & (keys >= found.least))
    if found.floor:
        assert np.array_equal(kept.nonzero()[0], np.sort(best))
    else:
        assert set((patterns > 0).nonzero()[0]) <= set(best)


@pytest.mark.parametrize("above", [True, False])
def test_a_threshold_outside_what_was_noted_is_looked_for_there(kernels: Native, above: bool) -> None:
    search = Search(100, 10_000)
    search.hint(np.array([0, 5000, 5001], np.uint32), np.array([0, 0, 2000], np.uint32), 2000)
    notes = Notes(search, 0)
    low = search.interval.low
    notes.add(Noted(np.arange(3, dtype=np.uint32), np.full(3, low, np.uint32), 0, 0, 200 if above else 5))
    notes.decide(Workspace(kernels, 1))
    assert not search.done
    interval = search.interval
    assert interval.low > low if above else interval.low + interval.last < low
    assert selection._is_notable(search)
