"""The arithmetic under the stages: known answers, exact counts, unbiased rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_oracles import draws, philox_block, splitmix, stream_key, words
from numba import njit

from ktmerge.merge.kernels import kernels_for, keys, philox, radix
from ktmerge.merge.kernels.codes import BLOCK
from ktmerge.merge.kernels.reference import Reference
from ktmerge.merge.kernels.rounding import round_to
from ktmerge.merge.kernels.search import Search
from ktmerge.merge.kernels.splitmix import hashes
from ktmerge.merge.kernels.sums import ExactSum
from ktmerge.merge.stage import Context

FULL = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0x299F31D0 << 32) | 0xA4093822
# From the kat_vectors file of Random123, the generator's reference distribution; keys low word first.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL << 32) | FULL, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI[0], PI[1], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: int, expected: tuple[int, ...]
) -> None:
    assert philox_block(counter, key) == expected
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox.philox(tensors, key)) == expected  # type: ignore[arg-type]


def test_words_go_by_element_alone() -> None:
    key = stream_key(3, "purpose", "expert", "tensor")
    expected = words(key, 300).astype(np.int64)
    for start, count in [(0, 300), (1, 299), (3, 2), (6, 1), (250, 50), (10, 0)]:
        assert philox.words(key, start, count).tolist() == expected[start : start + count].tolist()


@pytest.mark.parametrize("far", [(1 << 18) - 4, 5 << 34])
def test_words_beyond_the_first_block_and_32_bits_of_blocks(far: int) -> None:
    expected = [
        word for block in (far // 4, far // 4 + 1) for word in philox_block((block & FULL, block >> 32, 0, 0), 99)
    ]
    assert philox.words(99, far, 8).tolist() == expected


def test_splitmix_gives_the_known_answers() -> None:
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert hashes(1234567, torch.arange(5)).numpy().view(np.uint64).tolist() == known
    assert splitmix(1234567, 5).tolist() == known
    key = stream_key(3, "trim", "expert", "tensor")
    at = torch.tensor([99, 0, 57])
    assert hashes(key, at).numpy().view(np.uint64).tolist() == splitmix(key, 100)[at.numpy()].tolist()


def test_keys_depend_on_every_field_and_are_the_documented_ones() -> None:
    fields = [
        (1, "dare", "a", "x"),
        (2, "dare", "a", "x"),
        (1, "trim", "a", "x"),
        (1, "dare", "b", "x"),
        (1, "dare", "a", "y"),
    ]
    fields += [(1, "dare", "ax", ""), (1, "dar", "ea", "x")]
    found = [keys.stream_key(*one) for one in fields]
    assert len(set(found)) == len(found)
    assert found == [stream_key(*one) for one in fields]


def context(start: int, tensor: str = "t") -> Context:
    kernels = kernels_for(torch.device("cpu"))
    return Context(tensor, "llm", {}, "matrix", (1,), start, 0, ("a",), (1.0,), torch.zeros(1), kernels, "a")


def select(values: list[torch.Tensor], count: int, chunk: int) -> list[torch.Tensor]:
    """Trim tensors together to ``count`` elements, shown in pieces of ``chunk``, last tensor first."""
    total = sum(tensor.numel() for tensor in values)
    observer = radix.MagnitudeThreshold(count, total, lambda ctx: keys.stream_key(0, "trim", "a", ctx.tensor))
    passes = 0
    while not observer.done:
        for number, tensor in reversed(list(enumerate(values))):
            for start in range(0, tensor.numel(), chunk):
                observer.observe(tensor[start : start + chunk], context(start, str(number)))
        observer.end_pass()
        passes += 1
    assert passes <= 10
    threshold = observer.result()
    kept = []
    for number, tensor in enumerate(values):
        key = keys.stream_key(0, "trim", "a", str(number))
        pieces = [radix.keep(tensor[s : s + chunk], key, s, threshold) for s in range(0, tensor.numel(), chunk)]
        kept.append(torch.cat(pieces))
    return kept


def by_sorting(values: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    ties = []
    for number, tensor in enumerate(values):
        ties.append(splitmix(stream_key(0, "trim", "a", str(number)), tensor.numel()))
    flat = torch.cat(values).numpy()
    order = np.lexsort((np.concatenate(ties), np.abs(flat)))
    kept = np.zeros_like(flat)
    if count:
        kept[order[-count:]] = flat[order[-count:]]
    return list(torch.split(torch.from_numpy(kept), [tensor.numel() for tensor in values]))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["noise", "ties", "one value", "zeros", "subnormal", "wide"]),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    share=st.floats(0, 1),
    chunk=st.sampled_from([3, 64, 1000]),
)
def test_radix_select_equals_sorting(seed: int, kind: str, sizes: list[int], share: float, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=generator) for size in sizes]
    if kind == "ties":
        values = [(tensor * 2).round() * 2.0**-20 for tensor in values]
    if kind == "one value":
        values = [torch.sign(tensor) * 0.5 for tensor in values]
    if kind == "zeros":
        values = [torch.zeros_like(tensor) for tensor in values]
    if kind == "subnormal":
        values = [tensor * 1e-40 for tensor in values]
    if kind == "wide":
        values = [tensor * 10.0 ** (60 * torch.rand(tensor.shape, generator=generator) - 30) for tensor in values]
    count = int(share * sum(sizes))
    for kept, expected in zip(select(values, count, chunk), by_sorting(values, count), strict=True):
        assert kept.equal(expected)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    share=st.floats(0.01, 0.99),
    size=st.sampled_from([50, 3000]),
    sample=st.sampled_from([1, 40, 2000]),
    steps=st.sampled_from([3, 400, 1 << 22]),
    misleading=st.booleans(),
)
def test_a_hint_changes_passes_but_never_the_result(
    seed: int, share: float, size: int, sample: int, steps: int, misleading: bool
) -> None:
    """Magnitudes on a coarse or fine grid; the sample may even be of something else."""
    generator = np.random.default_rng(seed)
    values = (np.round(generator.standard_normal(size) * steps) / steps).astype(np.float32)
    magnitudes = np.abs(values).view(np.uint32)
    shown = np.abs(generator.standard_normal(sample) * 1000).astype(np.float32).view(np.uint32)
    shown = shown if misleading else generator.choice(magnitudes, sample)
    keys = hashes(9, torch.arange(size)).numpy().view(np.uint64)
    found = []
    for hint in (False, True):
        search = Search(int(share * size), size)
        if hint:
            edges = np.unique(np.concatenate(([0], shown, [shown.max(initial=0) + 1]))).astype(np.uint32)
            search.hint(edges, np.sort(shown).searchsorted(edges), shown.size)
        while not search.done:
            interval = search.interval
            chosen = (keys[magnitudes == interval.floor] if interval.hashed else magnitudes).astype(np.uint64)
            offsets = chosen[chosen >= np.uint64(interval.low)] - np.uint64(interval.low)
            inside = offsets[offsets <= np.uint64(interval.last)]
            bins = (inside >> np.uint64(interval.shift)).astype(np.int64)
            counts, lows = np.zeros(interval.bins + 1, np.int64), np.zeros(interval.bins, np.uint32)
            counts[:-1], counts[-1] = np.bincount(bins, minlength=interval.bins), offsets.size - inside.size
            if not interval.hashed:
                np.bitwise_or.at(lows, bins, (inside & np.uint64((1 << interval.shift) - 1)).astype(np.uint32))
            search.add(counts, lows if hint and not interval.hashed else None)
            search.end_pass()
        found.append(search.result())
    kept = [(magnitudes > one.floor) | ((magnitudes == one.floor) & (keys >= np.uint64(one.least))) for one in found]
    assert np.array_equal(kept[0] & (magnitudes > 0), kept[1] & (magnitudes > 0))
    assert kept[0].sum() == int(share * size) or found[0].floor == 0


def test_ties_do_not_prefer_the_first_rows() -> None:
    kept = select([torch.ones(20_000)], 10_000, 1 << 20)[0]
    halves = kept[:10_000].count_nonzero(), kept[10_000:].count_nonzero()
    assert kept.count_nonzero() == 10_000
    assert abs(int(halves[0]) - 5_000) < 5 * 50  # five standard deviations of a fair choice


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50), st.integers(1, 2))
def test_exact_sums_are_exact(values: list[float], power: int) -> None:
    total = ExactSum(power)
    half = len(values) // 2
    for piece in (values[half:], values[:half]):
        total.add(torch.tensor(piece, dtype=torch.float32))
    assert total.value() == sum(abs(Fraction(value)) ** power for value in values)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_has_the_right_mean_and_only_neighbours(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    small = [1e-7, -3.3e-8, 5e-6] if dtype == torch.float16 else [1e-39, -3e-40]
    values = torch.tensor([0.1, -0.1, 1.0 + 2.0**-12, 3.14159, -777.7, 0.99999, *small])
    draws = 40_000
    generator = torch.Generator().manual_seed(0)
    for value in values:
        random = torch.randint(0, 2**32, (draws,), generator=generator)
        rounded = round_to(value.expand(draws).contiguous(), dtype, "stochastic", random).double()
        exact = float(value)
        found = sorted(set(rounded.tolist()))
        assert len(found) == 2
        assert found[0] < exact < found[1]
        middle = (found[0] + found[1]) / 2
        assert found == sorted({found[0], found[1]})
        between = torch.tensor(middle, dtype=torch.float64).to(dtype).double()
        assert float(between) in found  # no representable value lies between them
        error = (found[1] - found[0]) / 2 / draws**0.5
        assert abs(float(rounded.mean()) - exact) < 5 * error
    assert limits.max > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_leaves_what_is_exact_and_what_is_not_a_number(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    rounded = round_to(values.float(), dtype, "stochastic", torch.full((values.numel(),), FULL))
    nan = values.isnan()
    assert rounded[nan].isnan().all()
    assert rounded[~nan].view(torch.int16).equal(values[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_never_makes_a_finite_value_infinite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest, -largest, float(np.nextafter(np.float32(largest), np.float32(np.inf)))])
    rounded = round_to(beyond, dtype, "stochastic", torch.full((3,), FULL))
    assert rounded.tolist() == [largest, -largest, largest]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_nearest_rounding_is_to_even(dtype: torch.dtype) -> None:
    bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    step = 2.0**-bits
    values = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step, 1 + 0.75 * step], dtype=torch.float64)
    assert round_to(values, dtype, "nearest").double().tolist() == [1.0, 1 + 2 * step, 1 + step]


def test_rounding_is_keyed_by_element() -> None:
    kernels = kernels_for(torch.device("cpu"))
    values = torch.linspace(0.1, 0.2, 500)
    whole = kernels.round(values, torch.bfloat16, "stochastic", 5, 0)
    pieces = [kernels.round(values[s : s + 77], torch.bfloat16, "stochastic", 5, s) for s in range(0, 500, 77)]
    assert whole.equal(torch.cat(pieces))
    assert not whole.equal(kernels.round(values, torch.bfloat16, "stochastic", 6, 0))


def test_what_is_in_an_interval_is_found_by_vectors_and_one_by_one() -> None:
    from ktmerge.merge.kernels import gathering

    random = np.random.default_rng(0)
    for size in (1024, 1000, 17, 16, 15, 9, 8, 7, 1, 0):
        patterns = random.integers(0, 2**32, size, dtype=np.uint32)  # of both signs
        for low, last in [(0, 2**31 - 1), (1 << 30, 1 << 28), (5, 0), (int(patterns[-1:].sum()) & 0x7FFFFFFF, 0)]:
            magnitudes = (patterns & 0x7FFFFFFF).astype(np.int64)
            expected = np.flatnonzero((magnitudes >= low) & (magnitudes <= low + last))
            for collect in (gathering.collect, gathering._collect_one_by_one):
                found = np.zeros(size, np.uint32)
                with np.errstate(over="ignore"):
                    count = int(collect(patterns, np.uint32(low), np.uint32(last), found))
                assert found[:count].tolist() == expected.tolist(), (size, low, last, collect)


@pytest.mark.slow
def test_a_trim_by_vectors_and_in_steps_keeps_an_interval_and_finds_its_ties() -> None:
    from ktmerge.merge.kernels import trimming

    random = np.random.default_rng(0)
    in_steps = njit(error_model="numpy")(trimming._trim_in_steps)
    for size in (1024, 1000, 17, 16, 15, 9, 8, 7, 1):
        raw, own = random.integers(0x3F00, 0x3F40, (2, size), dtype=np.uint16)  # few values, so that many are tied
        raw[::5] = own[::5]
        base = own.astype(np.uint32) << 16
        theirs = raw.astype(np.uint32) << 16
        delta = (theirs.view(np.float32) - base.view(np.float32)).view(np.uint32)
        magnitudes = (delta & 0x7FFFFFFF).astype(np.int64)
        for floor, span in [(1, 2**31 - 1), (int(magnitudes[-1]) or 1, 2**31), (0x3D800000, 1 << 22), (1, 0)]:
            inside = (magnitudes >= floor) & (magnitudes < floor + span)
            for trim in (trimming.trim, in_steps):
                (patterns, kept, tied), found = np.zeros((3, size), np.uint32), np.zeros(2, np.uint32)
                count = int(trim(raw, base, np.uint32(floor), np.uint32(span), patterns, kept, tied, found))
                assert patterns.tolist() == theirs.tolist()
                assert kept.tolist() == np.where(inside, delta, 0).tolist(), (size, floor, span)
                assert tied[:count].tolist() == np.flatnonzero(inside & (magnitudes == floor)).tolist(), (size, floor)
                assert found.tolist() == [magnitudes.max(), inside.sum()]


@pytest.mark.slow
def test_what_stays_is_not_stored_by_masks() -> None:
    """Which the compiler would do where only some of an array's elements change, and AVX2 does slowly."""
    from ktmerge.merge.kernels import settling, transforming

    values = np.ones(100, np.float32)
    for function, arguments in [
        (settling.settle_expert, (values, values, values, values)),
        (settling.settle_base, (values, values, values)),
        (transforming._keep_within, (values, np.uint32(1), np.uint32(2))),
    ]:
        function(*arguments)
        assert all("maskmov" not in code for code in function.inspect_asm().values()), function


def test_compiled_words_are_the_references() -> None:
    hybrid = kernels_for(torch.device("cpu"))
    for start, count in [(0, 10), (3, 2600), (1021, 4), (7, 1), (4, 0), (2**34 + 1, 1030)]:
        expected = philox.words(stream_key(0, "a", "b", "c"), start, count)
        assert hybrid.words(stream_key(0, "a", "b", "c"), start, count, torch.device("cpu")).equal(expected)


def test_draws_go_by_element_alone() -> None:
    key = stream_key(3, "purpose", "expert", "tensor")
    expected = draws(key, 301).astype(np.int64)
    for kernels in (Reference(), kernels_for(torch.device("cpu"))):
        for start, count in [(0, 301), (1, 299), (3, 2), (6, 1), (7, 0), (250, 51)]:
            found = kernels.draws(key, start, count, torch.device("cpu"))
            assert found.tolist() == expected[start : start + count].tolist(), (start, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 15, 16, 17, 1055, 1056])
def test_masks_are_those_of_the_draws(count: int) -> None:
    """Also where only the lower half of a draw decides: just below one, at it, and above."""
    from ktmerge.merge.kernels.randomness import draw

    @njit
    def fill(key: int, start: int, cut: int, words: np.ndarray, out: np.ndarray) -> None:
        masks = draw(key, start, out.size, cut, words)
        for i in range(out.size):
            out[i] = masks[i]

    key, start = stream_key(1, "dare", "expert", "tensor"), 8 * 1234567
    expected = Reference().draws(key, start, count, torch.device("cpu")).numpy()
    one = int(expected[count // 2])
    for cut in (0, 1, 1 << 16, one - 1, one, one + 1, one >> 16 << 16, 1 << 31, (1 << 32) - 1, 1 << 32):
        masks = np.empty(count, np.uint16)
        fill(np.uint64(key), np.uint64(start), np.uint64(cut), np.zeros(BLOCK, np.uint32), masks)
        assert masks.tolist() == np.where(expected < cut, 0xFFFF, 0).tolist(), cut


@pytest.mark.parametrize("steps", [1, 40, 1e9])
@pytest.mark.parametrize("shape", [(3, 7), (5, 3000), (1, 1)])
def test_ranks_in_rows_are_those_of_sorting(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], steps: float
) -> None:
    """Of few magnitudes or many, of rows as they lie and turned, by the compiled kernel and by torch."""
    from ktmerge.merge.rows import ranks_of

    generator = torch.Generator().manual_seed(1)
    stored = (torch.randn(shape, generator=generator) * steps).round() / steps
    elements = torch.arange(stored.numel()).view(shape)
    key = stream_key(5, "rank", "", "t")
    upper = (splitmix(key, stored.numel()) >> np.uint64(32)).reshape(shape)
    for rows, where, ties in [(stored, elements, upper), (stored.T, elements.T, upper.T)]:
        order = np.lexsort((ties, np.abs(rows.numpy())), axis=1)
        expected = np.empty(rows.shape, np.int64)
        np.put_along_axis(expected, order, np.broadcast_to(np.arange(rows.shape[1]), rows.shape), 1)
        for kernels in ("auto", "reference"):
            monkeypatch.setenv("KTMERGE_KERNELS", kernels)
            assert ranks_of(rows, where, key).tolist() == expected.tolist(), kernels
