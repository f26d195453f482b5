"""Merging by regression without data: what it must give where the answer is known, and the solver's own promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.merge.common import shared
from ktmerge.merge.covariance import Covariance, of_delta, of_inputs, of_rows, total
from ktmerge.merge.gramian import solver
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.registry import find_stage
from ktmerge.merge.regression import Filter, leading, spectral_regmean
from ktmerge.merge.stage import Context

FILTERS = [
    Filter("none"),
    Filter("exp", time=30.0),
    Filter("tikhonov", strength=0.5),
    Filter("tikhonov", strength=0.0),
    Filter("none", rank="participation"),
    Filter("exp", time=30.0, rank="fraction", keep=0.4),
    Filter("tikhonov", strength=0.5, rank="energy", keep=0.6),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def context(experts: int, shape: tuple[int, ...], base: Tensor | None = None, **other: Any) -> Context:
    return Context(
        tensor="model.layers.0.mlp.up_proj.weight", part="llm.layers[0]", layers={"llm": 2}, tensor_class="matrix",
        shape=shape, start=0, seed=1, experts=tuple("abcdef"[:experts]), weights=(1.0,) * experts,
        base=torch.zeros(shape) if base is None else base, kernels=kernels_for(torch.device("cpu")),
        layout=MatrixLayout(False, (shape[-2],)), **other,
    )  # fmt: skip


def apart(experts: int, outputs: int, inputs: int) -> list[Tensor]:
    """Deltas that read different inputs, in a turned frame: their row spaces are orthogonal."""
    frame = torch.linalg.qr(random(inputs, inputs, seed=99))[0]
    each = inputs // experts
    return [random(outputs, each, seed=t) @ frame[t * each : (t + 1) * each] for t in range(experts)]


@pytest.mark.parametrize("filter", FILTERS, ids=str)
@pytest.mark.parametrize("shape", [(12, 7), (5, 17)])
def test_one_member_comes_back(filter: Filter, shape: tuple[int, int]) -> None:
    delta = random(*shape)
    for init in ("mean", "sum"):
        close(spectral_regmean([delta], [of_delta(delta)], filter, init), delta)


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_equal_members_give_the_one(filter: Filter) -> None:
    delta = random(6, 9)
    close(spectral_regmean([delta] * 3, [of_delta(delta)] * 3, filter, "mean"), delta)


def test_members_that_read_different_inputs_add_up() -> None:
    deltas = apart(3, 8, 12)
    for init in ("mean", "sum", "zero"):
        close(
            spectral_regmean(deltas, [of_delta(one) for one in deltas], Filter("none"), init),
            sum(deltas[1:], deltas[0]),
        )


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 30), (9, 30), (20, 8)])
def test_the_dual_equals_the_primal(outputs: int, inputs: int) -> None:
    deltas = [random(outputs, inputs, seed=t) for t in range(3)]
    rows = [of_delta(one) for one in deltas]
    nothing = torch.zeros(inputs, inputs, dtype=torch.float64)
    whole = [Covariance(torch.cat([one.factor, nothing]), one.diagonal) for one in rows]
    for filter, init in product(FILTERS, ("mean", "sum", "zero")):
        close(spectral_regmean(deltas, rows, filter, init), spectral_regmean(deltas, whole, filter, init), 1e-8)
    weights, base = [0.5, 0.0, 2.0], of_delta(random(outputs, inputs, seed=9))
    for filter in FILTERS:
        dual, primal = (
            spectral_regmean(deltas, told, filter, "mean", weights=weights, base=base) for told in (rows, whole)
        )
        close(dual, primal, 1e-8)


@pytest.mark.parametrize("count", [3, 30])
def test_what_has_no_weak_direction_needs_no_decomposition(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, target, start = random(count + 2, count), random(4, count, seed=1), random(4, count, seed=2)
    dense = rows.T @ rows
    least = float(torch.linalg.svdvals(rows)[-1]) ** 2
    passed: list[int] = []

    def factors(values: Tensor) -> Tensor:
        passed.append(values.numel())
        return torch.ones_like(values)

    expected = target @ torch.linalg.inv(dense)
    for floor, decomposed in ((0.0, []), (0.99 * least, []), (1.01 * least, [count])):
        close(solver(factors, floor, 0.0, whole=True)(dense, target, start), expected, 1e-8)
        assert passed == decomposed
    close(
        solver(factors, 0.0, 0.5, whole=True)(dense, target, start),
        start + (target - start @ dense) @ torch.linalg.inv(dense + 0.5 * torch.eye(count, dtype=torch.float64)),
    )
    lost = dense - dense[:, :1] @ dense[:1] / dense[0, 0]
    close(solver(factors, 0.0, 0.0, whole=True)(lost, start @ lost, start), start, 1e-8)
    assert passed == [count, count - 1]


def test_the_answer_is_where_the_objective_is_flat() -> None:
    deltas = [random(6, 10, seed=t) for t in range(3)]
    covariances = [of_inputs(random(25, 10, seed=t + 5), eta=0.9) for t in range(3)]
    base, weights = of_inputs(random(25, 10, seed=9)), [0.5, 2.0, 1.0]
    merged = spectral_regmean(deltas, covariances, Filter("none"), "mean", weights=weights, base=base)
    pulls = [a * one.times(merged - d) for a, one, d in zip(weights, covariances, deltas, strict=True)]
    gradient = sum(pulls, base.times(merged))
    assert float(gradient.norm()) < 1e-6 * float(pulls[0].norm())


def test_a_base_of_great_weight_pins_what_it_reads() -> None:
    deltas, base = apart(2, 5, 10), apart(2, 5, 10)[0]
    covariances = [of_delta(one) for one in deltas]
    held = spectral_regmean(deltas, covariances, Filter("none"), "mean", base=of_delta(base).scaled(1e7))
    close(held, deltas[1], 1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_covariances_say_what_their_matrix_says(eta: float) -> None:
    few, many = random(4, 9), random(30, 9, seed=1)
    values = random(3, 9, seed=2)
    for inputs in (few, many):
        one = of_inputs(inputs, eta).ridged(0.1)
        raw = inputs.T @ inputs / inputs.shape[0]
        matrix = eta * raw + (1 - eta) * raw.diag().diag() + 0.1 * torch.eye(9, dtype=torch.float64)
        close(one.dense(), matrix)
        close(one.variances(), matrix.diag())
        close(one.times(values), values @ matrix)
        close(one.energy(values), (values @ matrix @ values.T).diag())
        other = 2 - values
        found = one.products([other, values], values)
        close(found[0], (other @ matrix @ values.T).diag())
        close(found[1], (values @ matrix @ values.T).diag())
        close(one.solve(values), torch.linalg.solve(matrix, values.T).T)
        assert one.trace() == pytest.approx(float(matrix.trace()))
        close(total([one, one.scaled(2)], [1.0, 0.25]).dense(), 1.5 * matrix)


def test_a_frame_has_its_own_rows_already() -> None:
    rows = random(5, 12)
    frame = of_rows(rows).frame()
    close(frame.of_rows(slice(1, 4)), frame.onto(rows[1:4]))


def test_frames_hold_the_eigenvectors() -> None:
    for rows in (random(4, 9), random(20, 9)):
        frame = of_rows(rows).frame()
        assert frame.eigenvalues.tolist() == sorted(frame.eigenvalues.tolist(), reverse=True)
        assert frame.eigenvalues.shape == (min(rows.shape),)
        close(frame.back(frame.onto(rows)), rows)
        close(frame.onto(rows).T @ frame.onto(rows), frame.eigenvalues.diag())
    assert of_rows(torch.zeros(3, 4)).frame().eigenvalues.numel() == 0


def test_rank_rules_count() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    assert leading(values, "all", 0.0, 10) == 4
    assert leading(values, "fraction", 0.15, 10) == 2
    assert leading(values, "fraction", 0.25, 10) == 4  # of equal ones all or none
    assert leading(values, "fraction", 0.9, 10) == 4
    assert leading(values, "energy", 0.75, 10) == 2
    assert leading(values, "energy", 1.0, 10) == 4
    assert leading(values, "nuclear", 0.0, 10) == 0
    assert leading(values, "stable", 0.0, 10) == 2
    assert leading(values, "participation", 0.0, 10) == 4
    assert leading(torch.ones(5, dtype=torch.float64), "participation", 0.0, 10) == 5


def test_signs_of_eigenvectors_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [random(6, 10, seed=t).float() for t in range(3)]
    stage = find_stage("spectral_regmean", "combine")
    parameters = stage.parameters(filter="exp", time=20.0)
    plain = stage.apply(deltas, parameters, context(3, (6, 10)))
    eigh = torch.linalg.eigh

    def turned(matrix: Tensor) -> Any:
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([1.0, -1.0], dtype=vectors.dtype).repeat(matrix.shape[0])[
            : matrix.shape[0]
        ]

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    close(stage.apply(deltas, parameters, context(3, (6, 10))), plain, 1e-6)


@pytest.mark.parametrize("residual", ["swudi_a", "wudi_cf", "sum", "root", "mean"])
def test_common_then_specific_of_one_and_of_equal_experts(residual: str) -> None:
    stage = find_stage("cts", "combine")
    parameters = stage.parameters(residual=residual)
    delta = random(6, 10).float()
    assert stage.apply([delta], parameters, context(1, (6, 10))).equal(delta)
    close(stage.apply([delta] * 3, parameters, context(3, (6, 10))), delta, 1e-6)


def test_weights_of_common_then_specific_may_cancel() -> None:
    stage = find_stage("cts", "combine")
    deltas = [one.float() for one in apart(2, 8, 12)]
    merged = stage.apply(deltas, stage.parameters(residual="sum"), replace(context(2, (8, 12)), weights=(1.0, -1.0)))
    close(merged, deltas[0] - deltas[1], 1e-5)


def test_common_then_specific_adds_what_reads_different_inputs() -> None:
    stage = find_stage("cts", "combine")
    deltas = [one.float() for one in apart(3, 8, 12)]
    for residual in ("sum", "wudi_cf"):
        merged = stage.apply(deltas, stage.parameters(residual=residual), context(3, (8, 12)))
        close(merged, deltas[0] + deltas[1] + deltas[2], 1e-5)
    common = stage.apply(deltas, stage.parameters(mu=0.0), context(3, (8, 12)))
    assert float(common.abs().max()) < 1e-5 * float(deltas[0].abs().max())


@pytest.mark.parametrize("turn", [False, True])
def test_the_same_answer_to_different_inputs_is_not_common(turn: bool) -> None:
    """Every eigenvalue is there twice, and mixtures of its eigenvectors are some; wanted are those of one expert."""
    answer, nothing = random(8, 5), torch.zeros(8, 5, dtype=torch.float64)
    frame = torch.linalg.qr(random(10, 10, seed=99))[0] if turn else torch.eye(10, dtype=torch.float64)
    deltas = [(torch.cat(pair, 1) @ frame).float() for pair in ((answer, nothing), (nothing, answer))]
    stage = find_stage("cts", "combine")
    for residual in ("sum", "wudi_cf"):
        merged = stage.apply(deltas, stage.parameters(residual=residual), context(2, (8, 10)))
        close(merged, deltas[0] + deltas[1], 1e-5)


def test_coherence_tells_common_from_specific() -> None:
    parts = apart(2, 5, 10)
    alike = shared([parts[0] + 0.3 * parts[1], parts[0] - 0.3 * parts[1]])
    assert sorted(alike.coherence.tolist()) == pytest.approx([0.0] * 5 + [1.0] * 5)
    energies = [float((part**2).sum()) for part in parts]
    assert alike.common_share() == pytest.approx(energies[0] / (energies[0] + 0.09 * energies[1]))
    assert shared(parts).common_share() == pytest.approx(0.0)
    assert shared([parts[0]]).common_share() == pytest.approx(1.0)


def test_an_expert_that_changed_nothing_is_no_member() -> None:
    deltas = [random(6, 10, seed=t).float() for t in range(2)]
    stage = find_stage("spectral_regmean", "combine")
    both = stage.apply(deltas, stage.parameters(), context(2, (6, 10)))
    third = stage.apply([*deltas, torch.zeros(6, 10)], stage.parameters(), context(3, (6, 10)))
    assert both.equal(third)
    assert stage.apply([deltas[0], torch.zeros(6, 10)], stage.parameters(), context(2, (6, 10))) is not None


def test_one_solver_is_many_methods() -> None:
    deltas, weights = [random(6, 10, seed=t) for t in range(2)], [0.5, 1.5]
    identity = Covariance(random(0, 10), torch.ones(10, dtype=torch.float64))
    whole = [of_inputs(random(30, 10, seed=t)).ridged(0.01) for t in range(3)]
    mean = (0.5 * deltas[0] + 1.5 * deltas[1]) / 2

    def solve(covariances: list[Covariance], filter: Filter, base: Covariance | None = None) -> Tensor:
        return spectral_regmean(deltas, covariances, filter, "mean", weights=weights, base=base)

    close(solve([identity] * 2, Filter("none")), mean)  # the average
    close(solve([identity] * 2, Filter("none"), identity.scaled(2.0)), mean / 2)  # WiSE-FT, alpha 1/2
    close(solve([identity] * 2, Filter("exp", time=0.0)), mean)
    grams = [one.dense() for one in whole]
    target = 0.5 * deltas[0] @ grams[0] + 1.5 * deltas[1] @ grams[1]
    close(solve(whole[:2], Filter("none")), target @ torch.linalg.inv(0.5 * grams[0] + 1.5 * grams[1]))  # RegMean
    both = 0.5 * grams[0] + 1.5 * grams[1] + 0.7 * grams[2]
    close(solve(whole[:2], Filter("none"), whole[2].scaled(0.7)), target @ torch.linalg.inv(both))  # with the base
    diagonal = [one.shrunk(0.0) for one in whole]
    share = [alpha * one.variances() for one, alpha in zip(diagonal[:2], weights, strict=True)]
    merged = solve(diagonal[:2], Filter("none"))
    close(merged, (deltas[0] * share[0] + deltas[1] * share[1]) / (share[0] + share[1]))  # Fisher, by inputs
