"""Sparse patches of one expert: Model Tailor and the exact fit, against float64 numpy and their own promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from merge_models import close, normal
from torch import Tensor

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.patching import fitted, inverse_factor
from ktmerge.merge.ranking import largest, largest_of_rows
from ktmerge.merge.registry import find_stage
from ktmerge.merge.stage import Context

SHAPE = (8, 12)


class Measured:
    def __init__(self, **inputs: Tensor) -> None:
        self._inputs = inputs

    def inputs(self, expert: str = "") -> Tensor:
        return self._inputs[expert or "base"]

    def fisher(self, expert: str = "") -> Tensor:
        raise AssertionError

    def fisher_norm(self, expert: str = "") -> float:
        raise AssertionError


def correlated(tokens: int, seed: int) -> Tensor:
    return normal(tokens, 12, seed=seed) @ (torch.eye(12) + 0.6 * normal(12, 12, seed=seed + 1))


FOUND = Measured(base=correlated(60, 5), a=correlated(60, 7))
BASE, DELTA = normal(*SHAPE, seed=3), 0.3 * normal(*SHAPE, seed=4)


def run(stage: str, found: Measured = FOUND, delta: Tensor = DELTA, **parameters: Any) -> Tensor:
    context = Context(
        tensor="model.layers.0.mlp.up_proj.weight", part="llm.layers[0]", layers={"llm": 2}, tensor_class="matrix",
        shape=tuple(delta.shape), start=0, seed=1, experts=("a",), weights=(1.0,), base=BASE, expert="a",
        kernels=kernels_for(torch.device("cpu")), layout=MatrixLayout(False, (8,)), measured=found,
    )  # fmt: skip
    one = find_stage(stage, "transform")
    result: Tensor = one.apply(delta, one.parameters(**parameters), context)
    assert result.dtype == torch.float32
    return result


def moment(name: str = "a", found: Measured = FOUND) -> np.ndarray:
    x = found.inputs(name).double().numpy()
    return x.T @ x / x.shape[0]


def damped(by: float, found: Measured = FOUND) -> np.ndarray:
    c = moment("a", found)
    return c + by * np.trace(c) / 12 * np.eye(12)


def missed(patch: Tensor, found: Measured = FOUND) -> float:
    """Mean squared error of the outputs on the tuned model's inputs."""
    return float((((patch - DELTA) @ found.inputs("a").T) ** 2).mean())


# --- the parts --------------------------------------------------------------------------------------------------------


def test_the_factor_of_the_inverse_is_upper_triangular() -> None:
    h = torch.as_tensor(damped(0.1))
    r = inverse_factor(h)
    close(r, torch.linalg.cholesky(torch.linalg.inv(h)).T, 1e-10)
    assert not r.tril(-1).any()


def test_rows_are_ranked_each_for_itself() -> None:
    scores = normal(6, 9).round(decimals=0).abs()  # many are equal
    for count in (0, 1, 4, 9):
        alone = [largest(row, count, 5 + number) for number, row in enumerate(scores)]
        assert largest_of_rows(scores, count, 5).equal(torch.stack(alone))
    assert largest_of_rows(torch.zeros(0, 9), 3, 5).shape == (0, 9)


@pytest.mark.parametrize("case", ["rows", "shared", "empty rows", "full"])
def test_fitted_patches_are_least_squares(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktmerge.merge.patching._ROOM", 40)  # several batches
    monkeypatch.setattr("ktmerge.merge.patching._PIECE", 2)
    h, target = torch.as_tensor(damped(0.1)), normal(*SHAPE).double()
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.4
    if case == "shared":
        mask = mask[:1].expand(SHAPE)
    if case == "empty rows":
        mask[[0, 3]] = False
    if case == "full":
        mask = torch.ones(SHAPE, dtype=torch.bool)
    found = fitted(target, h, mask)
    for row in range(8):
        support = mask[row]
        wanted = torch.zeros(12, dtype=torch.float64)
        if support.any():
            wanted[support] = torch.linalg.solve(h[support][:, support], target[row, support])
        torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-12)
        assert not found[row][~support].any()
    gradient = (found @ h - target)[mask]
    assert float(gradient.norm()) < 1e-6 * float(target.norm())


# --- Model Tailor -----------------------------------------------------------------------------------------------------


def standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)


def tailored(
    score: str, decoration: str, density: float, block: int, damp: float, found: Measured = FOUND
) -> np.ndarray:
    """The paper's sweep, with its R from the inverse itself."""
    h, base, tau = damped(damp, found), BASE.double().numpy(), DELTA.double().numpy()
    r = np.linalg.cholesky(np.linalg.inv(h)).T
    felt, up = np.sqrt(np.diag(moment("a", found))), np.sqrt(np.diag(moment("base", found)))
    sequential = decoration in ("obs", "paper")
    left, mask = tau.copy(), np.zeros(SHAPE, bool)
    for start in range(0, 12, block):
        columns = list(range(start, min(start + block, 12)))
        part, pivots = left[:, columns], np.diag(r)[columns]
        scores = {
            "mag": abs(part),
            "wanda": abs(part) * felt[columns],
            "delta_obs": part**2 / pivots**2,
            "up_aware": abs(part) * felt[columns] / (0.1 * up.mean() + up[columns]),
            "paper": standard(abs(part)) / 2 + standard((base[:, columns] + part) ** 2 / pivots**2) / 2,
        }[score]
        keep = np.argsort(scores.reshape(-1))[::-1][: int(density * scores.size)]
        own = np.zeros(scores.size, bool)
        own[keep] = True
        mask[:, columns] = own.reshape(scores.shape)
        for j in columns if sequential else []:
            error = np.where(mask[:, j], 0, left[:, j]) / r[j, j]
            left[:, j] = np.where(mask[:, j], left[:, j], 0)
            left[:, j + 1 :] += (-1 if decoration == "obs" else 1) * np.outer(error, r[j, j + 1 :])
    if sequential:
        return left
    kept = np.where(mask, tau, 0)
    if decoration == "scalar":
        kept *= (kept @ h * tau).sum() / (kept @ h * kept).sum()
    if decoration == "exact":
        for j in range(8):
            s = mask[j]
            kept[j, s] = np.linalg.solve(h[np.ix_(s, s)], (tau[j] @ h)[s])
    return kept


@pytest.mark.parametrize("score", ["mag", "wanda", "delta_obs", "up_aware", "paper"])
@pytest.mark.parametrize("decoration", ["none", "scalar", "obs", "exact", "paper"])
def test_model_tailor_is_its_formula(score: str, decoration: str) -> None:
    patch = run("model_tailor", score=score, decoration=decoration, density=0.3, block=7, damp=0.05)
    close(patch, tailored(score, decoration, 0.3, 7, 0.05))
    counts = [(patch[:, columns] != 0).sum() for columns in (slice(0, 7), slice(7, 12))]
    assert counts == [16, 12]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("block", [2, 5, 12])
def test_few_samples_give_the_same_sweep(tokens: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With at most i / 2 of them H is never written out."""
    monkeypatch.setattr("ktmerge.merge.tailoring._STEP", 2)
    monkeypatch.setattr("ktmerge.merge.compensation.Factor", None)
    few = Measured(base=correlated(60, 5), a=correlated(60, 7)[:tokens])
    if not tokens:
        assert run("model_tailor", few, density=0.3).isfinite().all()
        return
    for score in ("wanda", "delta_obs"):
        for decoration in ("obs", "paper"):
            patch = run("model_tailor", few, score=score, decoration=decoration, density=0.3, block=block, damp=0.05)
            close(patch, tailored(score, decoration, 0.3, block, 0.05, few))


@pytest.mark.parametrize("score", ["mag", "wanda", "delta_obs", "up_aware"])
def test_decorations_lessen_the_error_and_the_published_sign_does_not(score: str) -> None:
    errors = {
        decoration: missed(run("model_tailor", score=score, decoration=decoration, density=0.3, damp=1e-6))
        for decoration in ("none", "scalar", "obs", "exact", "paper")
    }
    assert errors["scalar"] <= errors["none"]
    assert errors["obs"] < errors["none"]
    assert errors["exact"] < errors["scalar"]
    assert errors["exact"] < errors["obs"]
    assert errors["paper"] > errors["none"]


@pytest.mark.parametrize("stage", ["model_tailor", "exact_patch"])
def test_ends_of_a_patch_are_exact(stage: str) -> None:
    assert run(stage, density=1.0).equal(DELTA)
    assert not run(stage, density=0.0).any()


@pytest.mark.parametrize("decoration", ["none", "scalar", "obs", "exact", "paper"])
def test_inputs_that_are_always_zero_are_no_obstacle(decoration: str) -> None:
    dead = FOUND.inputs("a").clone()
    dead[:, [2, 9]] = 0
    nothing = torch.zeros(0, 12)
    for inputs in (dead, torch.zeros(60, 12), nothing):
        found = Measured(base=inputs, a=inputs)
        patch = run("model_tailor", found, score="up_aware", decoration=decoration, density=0.3)
        assert patch.isfinite().all()
    assert not run("model_tailor", delta=torch.zeros(SHAPE), decoration=decoration).any()


# --- the exact patch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", ["row", "shared"])
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_exact_patch_is_its_formula(support: str, kappa: float) -> None:
    patch = run("exact_patch", density=0.35, kappa=kappa, support=support, ridge=0.02)
    h_d, tau = damped(0.02), DELTA.double().numpy()
    h = h_d + kappa * moment("base")
    felt = np.sqrt(np.diag(moment()))
    expected = np.zeros(SHAPE)
    for j in range(8):
        scores = np.linalg.norm(tau, axis=0) * felt if support == "shared" else abs(tau[j]) * felt
        s = np.argsort(scores)[-int(0.35 * 12) :]
        expected[j, s] = np.linalg.solve(h[np.ix_(s, s)], (tau[j] @ h_d)[s])
    close(patch, expected)
    assert ((patch != 0).sum(1) == 4).all()


def test_upstream_weight_trades_one_error_for_the_other() -> None:
    felt, errors = [], []
    for kappa in (0.0, 0.3, 3.0, 300.0):
        patch = run("exact_patch", density=0.5, kappa=kappa)
        felt.append(float(((patch @ FOUND.inputs().T) ** 2).mean()))
        errors.append(missed(patch))
    assert felt == sorted(felt, reverse=True)
    assert errors == sorted(errors)


def test_patches_of_several_experts_lie_over_one_another() -> None:
    one, two = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([3.0, 5.0, 0.0, 0.0])
    context = Context(
        tensor="t", part="", layers={}, tensor_class="vector", shape=(4,), start=0, seed=1, experts=("a", "b"),
        weights=(1.0, 3.0), base=torch.zeros(4), kernels=kernels_for(torch.device("cpu")),
    )  # fmt: skip
    stage = find_stage("stitch", "combine")
    assert stage.apply([one, two], stage.parameters(), context).tolist() == pytest.approx([2.5, 5.0, 2.0, 0.0])
