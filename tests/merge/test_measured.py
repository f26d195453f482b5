"""Methods that rest on measurements: against their formulas in float64 numpy, and what they promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from merge_models import close, normal
from torch import Tensor

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.errors import KtmergeError
from ktmerge.merge.covariance import of_inputs
from ktmerge.merge.curve import back, with_priors
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.registry import find_stage, stages
from ktmerge.merge.stage import Context

UP = "model.layers.0.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
OUTPUT = "model.layers.0.self_attn.o_proj.weight"
COMBINES = ("regmean", "regmean_back")


class Measured:
    """Inputs and Fisher information by expert, the base's under the empty name."""

    def __init__(
        self,
        inputs: dict[str, Tensor] | None = None,
        fisher: dict[str, Tensor] | None = None,
        scales: dict[str, Tensor] | None = None,
    ) -> None:
        self._inputs, self._fisher, self._scales = inputs or {}, fisher or {}, scales or {}

    def inputs(self, expert: str = "") -> Tensor:
        return self._inputs[expert]

    def fisher(self, expert: str = "") -> Tensor:
        return self._fisher[expert]

    def scales(self, expert: str = "") -> Tensor | None:
        return self._scales.get(expert)

    def fisher_norm(self, expert: str = "") -> float:
        return {"": 2.0, "a": 3.0, "b": 0.5}[expert]


def correlated(tokens: int, inputs: int, seed: int) -> Tensor:
    """Inputs of unequal strength that have to do with each other."""
    return (normal(tokens, inputs, seed=seed) * torch.linspace(0.3, 2, inputs)) @ normal(inputs, inputs, seed=seed + 1)


def measured(experts: str = "a", inputs: int = 10, tokens: int = 40) -> Measured:
    return Measured({name: correlated(tokens, inputs, seed) for seed, name in enumerate(("", *experts), 20)})


def run(
    stage: str,
    deltas: Sequence[Tensor],
    found: Measured | None,
    merged: Tensor | None = None,
    *,
    weights: tuple[float, ...] = (),
    tensor: str = UP,
    base: Tensor | None = None,
    layout: MatrixLayout | None = None,
    **parameters: Any,
) -> Tensor:
    shape = tuple(deltas[0].shape)
    context = Context(
        tensor=tensor, part="llm.layers[0]", layers={"llm": 2}, tensor_class="matrix", shape=shape, start=0, seed=1,
        experts=tuple("abc"[: len(deltas)]), weights=weights or (1.0,) * len(deltas),
        base=normal(*shape, seed=50) if base is None else base, kernels=kernels_for(torch.device("cpu")),
        layout=layout or MatrixLayout(False, shape[-2:-1]), measured=found,
    )  # fmt: skip
    one = stages()[stage]
    values = (list(deltas),) if one.kind == "combine" else (deltas[0] if merged is None else merged, list(deltas))
    copies = [delta.clone() for delta in deltas]
    result: Tensor = one.apply(*values, one.parameters(**parameters), context)
    assert all(delta.equal(copy) for delta, copy in zip(deltas, copies, strict=True))
    assert result.dtype == torch.float32
    assert result.shape == shape
    return result


def second_moment(inputs: Tensor, eta: float = 1.0) -> np.ndarray:
    x = inputs.double().numpy()
    moment = x.T @ x / x.shape[0]
    return eta * moment + (1 - eta) * np.diag(np.diag(moment))


def objective(merged: Tensor, found: Measured, delta: Tensor, a: float) -> float:
    felt = float(((merged @ found.inputs().T) ** 2).mean())
    missed = float((((merged - delta) @ found.inputs("a").T) ** 2).mean())
    return (1 - a) * felt + a * missed


# --- regmean ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("normalise", ["none", "trace"])
@pytest.mark.parametrize("base_weight", [0.0, 0.4])
def test_regmean_is_its_formula(tokens: int, normalise: str, base_weight: float) -> None:
    deltas, weights = [normal(7, 10, seed=t) for t in range(3)], (0.5, 2.0, 0.5)
    found = measured("abc", tokens=tokens)
    merged = run("regmean", deltas, found, weights=weights, eta=0.8, normalise=normalise, base_weight=base_weight)
    grams = {name: second_moment(found.inputs(name), 0.8) for name in ("", *"abc")}
    if normalise == "trace":
        grams = {name: gram / np.trace(gram) for name, gram in grams.items()}
    own = [delta.double().numpy() for delta in deltas]
    mean = sum(weights) / 3
    total = sum(w / mean * grams[name] for name, w in zip("abc", weights, strict=True)) + base_weight * grams[""]
    rho = 1e-3 * np.trace(total) / 10
    target = sum(w / mean * d @ grams[name] for name, d, w in zip("abc", own, weights, strict=True))
    target = target + rho * sum(w * d for d, w in zip(own, weights, strict=True)) / sum(weights)
    close(merged, np.linalg.solve(total + rho * np.eye(10), target.T).T)


def test_regmean_of_equal_inputs_is_the_mean_and_of_one_expert_the_expert() -> None:
    deltas = [normal(7, 10, seed=t) for t in range(2)]
    same = correlated(30, 10, 3)
    found = Measured({"a": same, "b": same})
    close(run("regmean", deltas, found, weights=(1.0, 3.0)), (deltas[0].double() + 3 * deltas[1].double()) / 4)
    assert run("regmean", deltas[:1], found).equal(deltas[0])
    close(run("regmean", [deltas[0]] * 2, measured("ab")), deltas[0].double())


# --- regmean_vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_weight", [0.0, 0.4])
def test_scales_of_norms_are_the_least_squares_fit_to_what_they_multiply(base_weight: float) -> None:
    deltas, weights = [normal(10, seed=t) for t in range(3)], (0.5, 2.0, 0.5)
    rows = {name: correlated(30, 10, seed).double().numpy() for seed, name in enumerate(("", *"abc"), 5)}
    for name in rows:
        rows[name][:, 3] = 0  # a feature that nobody uses
    squares = {name: torch.from_numpy((found**2).mean(0)).float() for name, found in rows.items()}
    merged = run(
        "regmean_vectors", deltas, Measured(scales=squares), weights=weights, vectors=True, base_weight=base_weight
    )
    own = [delta.double().numpy() for delta in deltas]
    expected = np.empty(10)
    for j in range(10):  # min_v sum_t w_t E (x_j v - x_j tau_j)^2, as a least-squares problem of stacked rows
        members = [*zip("abc", own, np.array(weights), strict=True), ("", np.zeros(10), base_weight)]
        roots = [np.sqrt(w) * rows[name][:, j] for name, _, w in members]
        wanted = [root * tau[j] for root, (_, tau, _) in zip(roots, members, strict=True)]
        left, right = np.concatenate(roots)[:, None], np.concatenate(wanted)
        expected[j] = np.linalg.lstsq(left, right, rcond=None)[0][0]
    expected[3] = sum(w * tau[3] for w, tau in zip(weights, own, strict=True)) / 3
    close(merged, expected)


def test_biases_are_means_and_so_are_scales_unless_asked() -> None:
    deltas = [normal(10, seed=t) for t in range(2)]
    mean = (deltas[0].double() + 3 * deltas[1].double()) / 4
    found = Measured(scales={"a": torch.full((10,), 9.0)})
    close(run("regmean_vectors", deltas, Measured(), weights=(1.0, 3.0), vectors=True), mean)
    close(run("regmean_vectors", deltas, found, weights=(1.0, 3.0)), mean)
    close(run("regmean_vectors", deltas, found, weights=(1.0, 3.0), vectors=True), deltas[0].double())
    assert run("regmean_vectors", deltas[:1], found, vectors=True).equal(deltas[0])


# --- regmean_back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("priors", [(0.0, 0.0), (0.3, 0.01)])
def test_back_merge_is_its_formula(tokens: int, priors: tuple[float, float]) -> None:
    delta, found, a = normal(7, 10), measured(tokens=tokens), 0.3
    merged = run("regmean_back", [delta], found, a=a, eta=0.7, ridge=0.01, prior_u=priors[0], prior_d=priors[1])
    up, down = (second_moment(found.inputs(name), 0.7) for name in ("", "a"))
    unit = (np.trace(up) + np.trace(down)) / 20
    up, down = up + (0.01 + priors[0]) * unit * np.eye(10), down + (0.01 + priors[1]) * unit * np.eye(10)
    close(merged, a * delta.double().numpy() @ down @ np.linalg.inv((1 - a) * up + a * down))


def test_ends_of_the_back_merge_are_exact() -> None:
    delta, found = normal(7, 10), measured()
    for stage in ("regmean_back", "cstar"):
        assert run(stage, [delta], found, a=1.0).equal(delta)
        assert not run(stage, [delta], found, a=0.0).any()


@pytest.mark.parametrize("stage", ["regmean_back", "cstar"])
def test_equal_sides_are_plain_interpolation(stage: str) -> None:
    delta, same = normal(7, 10), correlated(30, 10, 3)
    close(run(stage, [delta], Measured({"": same, "a": same}), a=0.3), 0.3 * delta.double())


def test_back_merge_is_where_the_objective_is_flat() -> None:
    deltas, shares, a = [normal(6, 10, seed=t).double() for t in range(2)], [0.25, 0.75], 0.4
    up, downs = with_priors(
        of_inputs(correlated(40, 10, 1)), [of_inputs(correlated(40, 10, seed)) for seed in (5, 9)], 1e-3, 1e-3
    )
    merged = back(deltas, shares, up, downs, a)
    pulls = [a * w * one.times(merged - d) for w, one, d in zip(shares, downs, deltas, strict=True)]
    assert float((sum(pulls) + (1 - a) * up.times(merged)).norm()) < 1e-6 * float(pulls[0].norm())


def test_back_merge_beats_interpolation_on_its_own_objective() -> None:
    delta, found = normal(7, 10), measured(tokens=200)
    merged = run("regmean_back", [delta], found, a=0.5, eta=1.0, ridge=1e-6)
    assert objective(merged, found, delta, 0.5) < 0.9 * min(
        objective(share * delta, found, delta, 0.5) for share in torch.linspace(0, 1, 21).tolist()
    )
    best = run("cstar", [delta], found, a=0.5)
    for share in torch.linspace(0, 1, 21).tolist():
        assert objective(best, found, delta, 0.5) <= objective(share * delta, found, delta, 0.5) + 1e-6


def test_priors_decide_about_inputs_nobody_saw() -> None:
    delta = normal(5, 10)
    seen = torch.cat([normal(30, 6), torch.zeros(30, 4)], 1)
    found = Measured({"": seen, "a": seen.flip(0)})
    for prior_u, prior_d, expected in ((0.0, 0.0, 0.5), (9.0, 0.0, 0.0), (0.0, 9.0, 1.0)):
        merged = run("regmean_back", [delta], found, eta=1.0, prior_u=prior_u, prior_d=prior_d)
        torch.testing.assert_close(merged[:, 6:], expected * delta[:, 6:], rtol=0, atol=2e-3)


def test_without_correlations_every_input_is_by_itself() -> None:
    delta, found = normal(7, 10), measured()
    merged = run("regmean_back", [delta], found, a=0.3, eta=0.0, ridge=1e-9)
    up, down = ((found.inputs(name).double() ** 2).mean(0) for name in ("", "a"))
    close(merged, delta.double() * 0.3 * down / (0.7 * up + 0.3 * down))


# --- cstar ------------------------------------------------------------------------------------------------------------


def energies(delta: np.ndarray, inputs: Tensor) -> np.ndarray:
    """Mean square of each output."""
    return ((inputs.double().numpy() @ delta.T) ** 2).mean(0)


def test_coefficients_are_their_formula() -> None:
    delta, found, a = normal(6, 10), measured(), 0.3
    values = delta.double().numpy()
    up, down = energies(values, found.inputs()), energies(values, found.inputs("a"))
    close(
        run("cstar", [delta], found, a=a, granularity="row"), values * (a * down / ((1 - a) * up + a * down))[:, None]
    )
    up, down = up.sum(), down.sum()
    close(run("cstar", [delta], found, a=a), values * (a * down / ((1 - a) * up + a * down)))
    fused = MatrixLayout(False, (4, 2))
    parts = [run("cstar", [delta[rows]], found, a=a) for rows in (slice(0, 4), slice(4, 6))]
    close(run("cstar", [delta], found, a=a, layout=fused), torch.cat(parts), 1e-7)


def test_coefficients_of_heads() -> None:
    delta, found = normal(6, 10), measured()
    knobs: dict[str, Any] = {"a": 0.3, "granularity": "head", "head_size": 2}
    rows = [run("cstar", [delta[start : start + 2]], found, a=0.3) for start in (0, 2, 4)]
    close(run("cstar", [delta], found, tensor=QUERY, **knobs), torch.cat(rows), 1e-7)
    columns = [
        run("cstar", [delta[:, s : s + 2]], Measured({n: found.inputs(n)[:, s : s + 2] for n in ("", "a")}), a=0.3)
        for s in range(0, 10, 2)
    ]
    close(run("cstar", [delta], found, tensor=OUTPUT, **knobs), torch.cat(columns, 1), 1e-7)
    close(run("cstar", [delta], found, tensor=UP, **knobs), run("cstar", [delta], found, a=0.3), 1e-7)
    objection = find_stage("cstar", "guard").objection
    parameters = find_stage("cstar", "guard").parameters(granularity="head")
    assert "head_size" in str(objection(parameters, {"a": 1.0}))


def test_coefficients_of_several_experts_minimise_the_error() -> None:
    deltas, found, a, weights = [normal(6, 10, seed=t) for t in range(2)], measured("ab"), 0.6, (1.0, 3.0)
    merged = deltas[0] + deltas[1]
    scaled = run("cstar", deltas, found, merged, a=a, weights=weights)
    ratio = float((scaled / merged).mean())
    close(scaled, ratio * merged.double())

    def cost(c: float) -> float:
        felt = energies(c * merged.double().numpy(), found.inputs()).sum()
        missed = [
            energies((c * merged - d).double().numpy(), found.inputs(n)).sum()
            for n, d in zip("ab", deltas, strict=True)
        ]
        return float((1 - a) * felt + a * (missed[0] + 3 * missed[1]) / 4)

    assert cost(ratio) < min(cost(ratio - 1e-3), cost(ratio + 1e-3))


def test_coefficients_without_data() -> None:
    deltas, base = [normal(6, 10, seed=t) for t in range(2)], normal(6, 10, seed=50)
    merged, a = deltas[0] + deltas[1], 0.7
    own, m, w = [one.double().numpy() for one in deltas], merged.double().numpy(), base.double().numpy()
    grams = [one.T @ one / (one**2).sum() for one in own]
    wanted = sum(np.trace(one @ gram @ m.T) for one, gram in zip(own, grams, strict=True)) / 2
    felt = sum(np.trace(m @ gram @ m.T) for gram in grams) / 2
    c = a * wanted / (a * felt + (1 - a) * np.trace(m @ w.T @ w @ m.T) / (w**2).sum())
    close(run("cstar", deltas, None, merged, a=a, covariance="weights", base=base), c * m)
    close(run("cstar", [deltas[0]] * 2, None, 2 * deltas[0], a=1.0, covariance="weights"), own[0])
    assert not run("cstar", [torch.zeros(6, 10)], None, covariance="weights").any()
    stage = find_stage("cstar", "guard")
    assert not stage.needs(stage.parameters(covariance="weights"))


def test_what_upstream_does_not_feel_is_kept_whole() -> None:
    delta = normal(6, 10)
    apart = {"": torch.cat([normal(30, 5), torch.zeros(30, 5)], 1), "a": correlated(30, 10, 2)}
    delta[:, :5] = 0
    assert run("cstar", [delta], Measured(apart), a=0.2).equal(delta)
    silent = Measured({"": torch.zeros(30, 10), "a": torch.zeros(30, 10)})
    close(run("cstar", [delta], silent, a=0.2), 0.2 * delta.double())


# --- nullspace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [6, 40])
def test_null_space_guards_are_their_formulas(tokens: int) -> None:
    delta, found = normal(7, 10), measured(tokens=tokens)
    up = second_moment(found.inputs())
    values, vectors = np.linalg.eigh(up)
    own = delta.double().numpy()
    close(run("nullspace", [delta], found, kappa=3.0), own @ np.linalg.inv(np.eye(10) + 3 * up / values.mean()))
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int(np.argmax(np.cumsum(values) >= 0.9 * values.sum())) + 1
    q = vectors[:, :count]
    hard = run("nullspace", [delta], found, mode="hard", energy=0.9)
    close(hard, own - own @ q @ q.T)
    close(run("nullspace", [hard], found, mode="hard", energy=0.9), hard.double(), 1e-5)


def test_null_space_guards_never_add_to_what_upstream_feels() -> None:
    delta, found = normal(7, 10), measured(tokens=30)
    felt = [float(((run("nullspace", [delta], found, kappa=k) @ found.inputs().T) ** 2).sum()) for k in (0, 1, 10, 1e6)]
    assert felt == sorted(felt, reverse=True)
    assert felt[-1] < 1e-8 * felt[0]
    cut = [
        float(((run("nullspace", [delta], found, mode="hard", energy=e) @ found.inputs().T) ** 2).sum())
        for e in (0.0, 0.5, 0.9, 1.0)
    ]
    assert cut == sorted(cut, reverse=True)
    assert run("nullspace", [delta], found, kappa=0.0).equal(delta)
    assert run("nullspace", [delta], found, mode="hard", energy=0.0).equal(delta)


# --- where the maps are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [*COMBINES, "cstar", "nullspace"])
def test_stacked_and_transposed_maps_meet_their_own_inputs(stage: str) -> None:
    deltas = [normal(3, 6, 10, seed=t) for t in range(2)]
    inputs = {
        name: torch.stack([correlated(30, 10, 7 * n + t) for t in range(3)]) for n, name in enumerate(("", "a", "b"))
    }
    stacked = run(stage, deltas, Measured(inputs))
    for t in range(3):
        own = Measured({name: values[t] for name, values in inputs.items()})
        base = normal(3, 6, 10, seed=50)[t]
        close(run(stage, [delta[t] for delta in deltas], own, base=base), stacked[t].double(), 1e-6)
    single = Measured({name: values[0] for name, values in inputs.items()})
    turned = run(stage, [delta[0].T for delta in deltas], single, layout=MatrixLayout(True, (6,)))
    close(run(stage, [delta[0] for delta in deltas], single), turned.T.double(), 1e-6)


@pytest.mark.parametrize("stage", [*COMBINES, "cstar", "nullspace"])
def test_measurements_that_are_missing_or_do_not_fit_are_refused(stage: str) -> None:
    deltas = [normal(6, 10, seed=t) for t in range(2)]
    with pytest.raises(KtmergeError, match="ktmerge stats"):
        run(stage, deltas, None)
    with pytest.raises(KtmergeError, match="has 10 inputs, but 9 were measured"):
        run(stage, deltas, measured("ab", inputs=9))


@pytest.mark.parametrize("stage", [*COMBINES, "cstar", "nullspace"])
def test_samples_without_a_token_are_no_obstacle(stage: str) -> None:
    deltas = [normal(6, 10, seed=t) for t in range(2)]
    assert run(stage, deltas, Measured({name: torch.empty(0, 10) for name in ("", "a", "b")})).isfinite().all()


@pytest.mark.parametrize(
    ("stage", "parameters"),
    [
        ("regmean", {"eta": 1.0, "base_weight": 0.3}),
        ("regmean_back", {"eta": 1.0, "prior_u": 0.2}),
        ("cstar", {}),
        ("nullspace", {}),
        ("nullspace", {"mode": "hard"}),
    ],
    ids=str,
)
def test_turned_maps_and_inputs_give_the_turned_merge(stage: str, parameters: dict[str, Any]) -> None:
    left, right = (torch.linalg.qr(normal(n, n, seed=n).double())[0] for n in (6, 10))
    deltas, found = [normal(6, 10, seed=t) for t in range(2)], measured("ab")
    turned = Measured({name: (found.inputs(name).double() @ right).float() for name in ("", "a", "b")})
    merged = run(stage, deltas, found, **parameters)
    there = run(stage, [(left @ delta.double() @ right).float() for delta in deltas], turned, **parameters)
    close(there, left @ merged.double() @ right, 2e-5)


def test_without_the_turn_of_inputs_it_is_another_merge() -> None:
    """So the test above can fail: shrinking off the diagonal knows the axes."""
    right = torch.linalg.qr(normal(10, 10, seed=10).double())[0]
    delta, found = normal(6, 10), measured()
    turned = Measured({name: (found.inputs(name).double() @ right).float() for name in ("", "a")})
    merged = run("regmean_back", [delta], found, eta=0.3).double() @ right
    there = run("regmean_back", [(delta.double() @ right).float()], turned, eta=0.3).double()
    assert float((there - merged).abs().max()) > 1e-2 * float(merged.abs().max())
