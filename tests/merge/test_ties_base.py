"""TIES with a vote for the base, against its formula in float64 numpy and against TIES."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from merge_models import normal
from torch import Tensor

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.registry import find_stage
from ktmerge.merge.stage import Context

OUT, IN = 9, 7


class Inputs:
    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def inputs(self, expert: str = "") -> Tensor:
        assert not expert
        return self._rows

    def fisher(self, expert: str = "") -> Tensor:
        raise AssertionError

    def fisher_norm(self, expert: str = "") -> float:
        raise AssertionError


def run(
    deltas: list[Tensor], rows: Tensor, weights: tuple[float, ...], stage: str = "elect_base", **given: float
) -> Tensor:
    context = Context(
        tensor="model.layers.0.mlp.up_proj.weight", part="llm.layers[0]", layers={"llm": 1}, tensor_class="matrix",
        shape=(OUT, IN), start=0, seed=1, experts=tuple("abc"[: len(deltas)]), weights=weights,
        base=normal(OUT, IN, seed=9), kernels=kernels_for(torch.device("cpu")), layout=MatrixLayout(False, (OUT,)),
        measured=Inputs(rows),
    )  # fmt: skip
    one = find_stage(stage, "combine")
    result: Tensor = one.apply(deltas, one.parameters(**given), context)
    return result


@pytest.mark.parametrize("kappa", [0.2, 0.5, 1.0, 3.0])
def test_is_its_formula(kappa: float) -> None:
    deltas, weights = [normal(OUT, IN, seed=seed) for seed in range(3)], (1.0, 0.5, 2.0)
    rows = normal(40, IN, seed=5) * torch.tensor([0.0, 0.1, 0.5, 1, 1, 2, 4])
    found = run(deltas, rows, weights, kappa=kappa)
    own = np.stack([delta.double().numpy() for delta in deltas])
    shares = np.array(weights)[:, None, None] / 2
    squares = (rows.double().numpy() ** 2).mean(0)
    needed = kappa * np.sqrt(squares / squares.mean()) * (shares * abs(own)).sum(0)
    total = (shares * own).sum(0)
    agree = (own * total > 0) & (abs(total) > needed)
    expected = (shares * own * agree).sum(0) / np.maximum((shares * agree).sum(0), 1e-300)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-7)
    assert found[:, 0].all(), "nothing upstream speaks against an input that it never uses"
    assert (found == 0).any()


def test_without_a_vote_it_is_ties_and_a_heavy_vote_keeps_the_base() -> None:
    deltas, rows = [normal(OUT, IN, seed=seed) for seed in range(3)], normal(30, IN, seed=5)
    assert run(deltas, rows, (1.0, 1.0, 2.0), kappa=0.0).equal(run(deltas, rows, (1.0, 1.0, 2.0), stage="elect"))
    assert not run(deltas, rows, (1.0, 1.0, 2.0), kappa=100.0).any()
    assert run(deltas, rows * 0, (1.0, 1.0, 2.0), kappa=9.0).equal(run(deltas, rows, (1.0, 1.0, 2.0), stage="elect"))


def test_a_larger_vote_only_takes_away() -> None:
    deltas, rows = [normal(OUT, IN, seed=seed) for seed in range(3)], normal(30, IN, seed=5)
    kept = [run(deltas, rows, (1.0, 1.0, 1.0), kappa=kappa) for kappa in (0.1, 0.4, 0.9)]
    for more, less in pairwise(kept):
        assert torch.where(less != 0, more, 0.0).equal(less)
        assert less.count_nonzero() < more.count_nonzero()
