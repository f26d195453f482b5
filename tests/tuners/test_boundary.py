"""The exact k largest among many tensors, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ktmerge.tuners.selection.boundary import ordered, select_largest


def run(scores: dict[str, torch.Tensor], count: int, luck: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    sizes = {name: len(one) for name, one in scores.items()}
    drawn = luck or {name: torch.arange(size, dtype=torch.int32) for name, size in sizes.items()}
    masks = select_largest(scores.__getitem__, sizes, count, drawn.__getitem__)
    assert list(masks) == list(scores)
    return np.concatenate([mask.numpy() for mask in masks.values()])


@pytest.mark.parametrize("count", [0, 1, 17, 200, 299, 300, 500])
@pytest.mark.parametrize("kind", ["spread", "few values", "one value", "signs of zero"])
def test_exactly_so_many_and_none_left_out_is_larger(count: int, kind: str) -> None:
    numbers = np.random.default_rng(3)
    values = {
        "spread": lambda: numbers.standard_normal(300) * 10.0 ** numbers.integers(-30, 30, 300),
        "few values": lambda: numbers.integers(-2, 3, 300),
        "one value": lambda: np.full(300, 0.25),
        "signs of zero": lambda: numbers.choice([0.0, -0.0, 1e-40], 300),
    }[kind]().astype(np.float32)
    pieces = {"a": torch.tensor(values[:100]), "b": torch.tensor(values[100:101]), "c": torch.tensor(values[101:])}
    mask = run(pieces, count)
    assert mask.sum() == min(count, 300)
    if 0 < count < 300:
        assert values[mask].min() >= values[~mask].max()


def test_luck_decides_between_equals_and_then_the_order() -> None:
    scores = {"a": torch.tensor([1.0, 5.0, 1.0]), "b": torch.tensor([1.0, 1.0, 0.0])}
    luck = {"a": torch.tensor([-7, 0, 2**31 - 1]), "b": torch.tensor([9, 9, 2**31 - 1])}
    assert run(scores, 3, luck).tolist() == [False, True, True, True, False, False]
    assert run(scores, 4, luck).tolist() == [False, True, True, True, True, False]


def test_keys_are_ordered_as_the_numbers_are() -> None:
    values = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, torch.inf])
    keys = ordered(values)
    assert bool((keys[1:] > keys[:-1]).all())
    assert keys.dtype == torch.int32
