"""Computations in lockstep: what they ask for together is answered together, however deep it is asked."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_memory import Workbench
from merge_models import Tensors

from ktmerge.merge import decompositions
from ktmerge.merge.decompositions import eigh, keeping, together
from ktmerge.merge.lockstep import ask, lockstep


class Squares:
    """Answers with squares, and notes what was asked together."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    def __call__(self, questions: list[int]) -> list[int]:
        self.calls.append(questions)
        return [one**2 for one in questions]

    def of(self, *questions: int) -> list[int]:
        return ask(list(questions), self)

    def lockstep(self, work: Any, items: Any) -> list[Any]:
        return lockstep(work, items, self, nullcontext)


def test_what_several_ask_for_is_answered_in_one_call() -> None:
    squares = Squares()

    def work(count: int) -> list[int]:
        found = [squares.of(10 * count + step)[0] for step in range(count)]
        return [*found, *squares.of(1, 2)] if count == 2 else found

    assert squares.lockstep(work, [2, 0, 1, 3]) == [[400, 441, 1, 4], [], [100], [900, 961, 1024]]
    assert squares.calls == [[20, 10, 30], [21, 31], [1, 2, 32]]
    assert squares.of(5) == [25]


def test_lockstep_within_lockstep_is_one_call_for_all() -> None:
    squares = Squares()

    def work(item: int) -> list[int]:
        return squares.lockstep(lambda part: squares.of(part)[0] + squares.of(item)[0], [item, item + 1])

    assert squares.lockstep(work, [1, 5]) == [[2, 5], [50, 61]]
    assert squares.calls == [[1, 2, 5, 6], [1, 1, 5, 5]]


@pytest.mark.parametrize("deep", [False, True])
def test_one_failure_ends_all(deep: bool) -> None:
    squares, before, ended = Squares(), set(threading.enumerate()), []

    def work(item: int) -> int:
        try:
            found = squares.of(item)[0]
            if item == 2:
                raise ValueError("two")
            return found + squares.of(item)[0]
        finally:
            ended.append(item)

    def pair(item: int) -> list[int]:
        return squares.lockstep(work, [item, item + 1])

    with pytest.raises(ValueError, match="two"):
        squares.lockstep(pair if deep else work, [1, 5] if deep else [1, 2, 3])
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert sorted(ended) == ([1, 2, 5, 6] if deep else [1, 2, 3])
    with pytest.raises(ZeroDivisionError):
        lockstep(lambda item: ask([item], lambda questions: [1 // 0]), [1, 2], lambda questions: [1 // 0], nullcontext)


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has a device that is the CPU under another name decompose; the shapes of what it is given, call by call."""
    calls: list[tuple[int, ...]] = []
    exact = decompositions._eigh

    def count(matrices: torch.Tensor) -> Any:
        calls.append(tuple(matrices.shape))
        return exact(matrices)

    monkeypatch.setenv(decompositions.PLACE, "cuda:0")
    monkeypatch.setattr(decompositions, "_place", {"cuda:0": "cpu:0", "cpu": "cpu"}.__getitem__)
    monkeypatch.setattr(decompositions, "_eigh", count)
    return calls


def symmetric(count: int, size: int) -> list[torch.Tensor]:
    halves = torch.randn(count, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return list(halves + halves.mT)


def test_matrices_of_one_shape_go_in_one_call(batched: list[tuple[int, ...]], tmp_path: Path) -> None:
    matrices = [*symmetric(3, 9), *symmetric(2, 4), torch.zeros(0, 0, dtype=torch.float64)]
    with keeping(0.01, tmp_path):
        for calls in (3, 3):  # the second time they are all known
            for matrix, (values, vectors) in zip(matrices, together(eigh, matrices), strict=True):
                np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(matrix.numpy()), atol=1e-12)
                np.testing.assert_allclose(vectors * values @ vectors.T, matrix, atol=1e-12)
            assert batched == [(3, 9, 9), (2, 4, 4), (1, 0, 0)][:calls]


def test_a_batch_is_no_larger_than_there_is_room_for(
    batched: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompositions, "_HELD", 2 * 5 * 8 * 9 * 9 + 1)
    expected = [eigh(matrix)[0] for matrix in symmetric(5, 9)]
    batched.clear()
    found = together(eigh, symmetric(5, 9))
    assert batched == [(2, 9, 9), (2, 9, 9), (1, 9, 9)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0], other, rtol=0, atol=1e-12)
    batched.clear()
    together(eigh, symmetric(5, 9), size=decompositions._HELD // 3)  # only so many wait at a time
    assert batched == [(2, 9, 9), (1, 9, 9), (2, 9, 9)]


STACKED = "model.layers.0.mlp.experts.gate_up_proj"
CALLS: dict[str, list[int]] = {
    "dg_hard": [12],
    "star": [12],
    "svd_truncate": [12],
    "wiener": [12],
    "cart": [12],
    "resmerge": [12],
    "iso_c": [4],
    "swudi_a": [4],
    "cts": [4],
    "knots": [4],
    "task_arithmetic_svc": [4],
    "tsv_m": [12, 8],
    "iso_cts": [4, 12, 8],
    "opcm": [4, 4],
}
"""Calls, and how many matrices each takes, of three experts' changes of two stacked gates and ups, 6 x 6 each."""


def stacked() -> tuple[Tensors, dict[str, Tensors]]:
    generator = torch.Generator().manual_seed(4)
    base = {STACKED: torch.randn(2, 12, 6, generator=generator)}
    experts = {name: {STACKED: base[STACKED] + 0.1 * torch.randn(2, 12, 6, generator=generator)} for name in "abc"}
    return base, experts


@pytest.mark.every(6)
@pytest.mark.parametrize("method", CALLS)
def test_experts_and_maps_of_one_tensor_go_together(
    batched: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    base, experts = stacked()
    blend = {"method": method, **{"opcm": {"scope": "tensor"}, "dg_hard": {"min_numel": 0}}.get(method, {})}
    found = Workbench(tmp_path).blend(base, experts, blend)[STACKED]
    assert [shape[0] for shape in batched] == CALLS[method]
    monkeypatch.delenv(decompositions.PLACE)
    torch.testing.assert_close(found, Workbench(tmp_path).blend(base, experts, blend)[STACKED], rtol=0, atol=1e-6)
