from __future__ import annotations

import numpy as np
import pytest

from ktmerge.eval import statistics


def test_standard_error_is_sd_over_root_n() -> None:
    scores = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    sd = np.sqrt(sum((x - 0.6) ** 2 for x in scores) / 4)
    assert statistics.standard_error(scores) == pytest.approx(100 * sd / np.sqrt(5))
    assert statistics.standard_error(scores[:1]) is None
    assert statistics.mean(scores) == pytest.approx(60)


def test_bootstrap_spread_equals_the_analytic_standard_error() -> None:
    source = np.random.default_rng(0)
    items = (source.random(400) < 0.7).astype(float)
    means = statistics.resampled_means({"t": items[None]}, 5_000, seed=1)["t"][0]
    assert means.mean() == pytest.approx(100 * items.mean(), abs=0.1)
    # the bootstrap's sd is that of the empirical distribution, with n and not n - 1
    assert means.std() == pytest.approx(100 * items.std() / 20, rel=0.03)
    low, high = statistics.interval(means)
    assert low == pytest.approx(100 * items.mean() - 1.96 * means.std(), abs=0.5)
    assert high == pytest.approx(100 * items.mean() + 1.96 * means.std(), abs=0.5)


def test_the_same_items_are_drawn_for_every_model() -> None:
    source = np.random.default_rng(0)
    base = (source.random(300) < 0.5).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:30]] = 1.0  # 10 points more, on 30 items
    means = statistics.resampled_means({"t": np.stack([base, better, base])}, 5000, seed=0)["t"]
    np.testing.assert_array_equal(means[0], means[2])
    difference = better - base
    assert (means[1] - means[0]).std() == pytest.approx(100 * difference.std() / np.sqrt(300), rel=0.05)
    unpaired = 100 * np.hypot(base.std(), better.std()) / np.sqrt(300)
    assert (means[1] - means[0]).std() < 0.5 * unpaired


def test_draws_depend_on_seed_and_task_only() -> None:
    source = np.random.default_rng(0)
    a, b = source.random((1, 50)), source.random((1, 70))
    alone = statistics.resampled_means({"a": a}, 300, seed=5)["a"]
    together = statistics.resampled_means({"b": b, "a": a}, 300, seed=5)
    np.testing.assert_array_equal(together["a"], alone)
    many = statistics.resampled_means({"a": np.repeat(a, 9, axis=0)}, 300, seed=5)["a"]
    np.testing.assert_allclose(many[4], alone[0], rtol=1e-12)
    assert not np.array_equal(statistics.resampled_means({"a": a}, 300, seed=6)["a"], alone)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"t": np.random.default_rng(0).random((3, 41))}
    whole = statistics.resampled_means(scores, 500, seed=2)["t"]
    monkeypatch.setattr(statistics, "_BLOCK", 3 * 41 * 7)
    np.testing.assert_allclose(statistics.resampled_means(scores, 500, seed=2)["t"], whole, rtol=1e-12)


def test_harmonic_mean() -> None:
    np.testing.assert_allclose(
        statistics.harmonic_mean(np.array([60.0, 0.0, 50.0]), np.array([30.0, 0.0, 0.0])), [40, 0, 0]
    )


def test_an_interval_that_ends_at_0_holds_0() -> None:
    dust = 0.3 - (0.1 + 0.2)
    assert dust < 0
    assert statistics.interval(np.array([-2.0] * 50 + [dust] * 50)) == (-2.0, 0.0)
    assert str(statistics.interval(np.array([dust] * 9))) == "(0.0, 0.0)"


def test_interval_covers_as_often_as_it_says() -> None:
    source = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        items = (source.random(120) < 0.6).astype(float)
        low, high = statistics.interval(statistics.resampled_means({"t": items[None]}, 400, seed=trial)["t"][0])
        covered += low <= 60 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_texts_are_drawn_whole() -> None:
    """Chunks that say the same four times tell no more than one of them."""
    texts = np.random.default_rng(4).random((2, 60))
    chunks, groups = np.repeat(texts, 4, axis=1), np.repeat(np.arange(60), 4).tolist()
    drawn = statistics.resampled_means({"t": chunks}, 300, 1, {"t": groups})["t"]
    np.testing.assert_allclose(drawn, statistics.resampled_means({"t": texts}, 300, 1)["t"], rtol=1e-12)
    assert statistics.standard_error(chunks[0], groups) == pytest.approx(statistics.standard_error(texts[0]))
    assert statistics.standard_error(chunks[0]) < 0.6 * statistics.standard_error(texts[0])


def test_intervals_over_texts_of_many_lengths_cover_as_often_as_they_say() -> None:
    """Chunks of a text share what the text is like; by chunk, six of ten intervals miss."""
    source = np.random.default_rng(5)
    covered, errors = np.zeros(2), []
    for trial in range(200):
        lengths = source.integers(1, 12, 60)
        groups = np.repeat(np.arange(60), lengths).tolist()
        scores = np.repeat(source.normal(0.5, 0.1, 60), lengths) + source.normal(0, 0.02, len(groups))
        for i, own in enumerate((groups, None)):
            low, high = statistics.interval(
                statistics.resampled_means({"t": scores[None]}, 200, trial, {"t": own})["t"][0]
            )
            covered[i] += low <= 50 <= high
        errors.append([statistics.standard_error(scores, groups), statistics.mean(scores) - 50])
    assert 0.87 <= covered[0] / 200 <= 0.99
    assert covered[1] / 200 < 0.75
    estimated, off = np.array(errors).T
    assert np.sqrt((estimated**2).mean()) == pytest.approx(off.std(), rel=0.15)


def test_chunks_of_a_single_text_are_drawn_by_themselves() -> None:
    assert statistics.groups_of([7, 7, 7]) == [0, 1, 2]
    assert statistics.groups_of([7, 7, 8]) == [7, 7, 8]
