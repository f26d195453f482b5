"""What the spectral methods promise beyond the oracles: ranks, norms, sums, maps, no say for arbitrary vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from merge_memory import MATRIX, Workbench
from merge_models import normal
from torch import Tensor

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.merge import decompositions, matrices, spectra
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.methods.isotropy import specific_count
from ktmerge.merge.methods.opcm import Normed
from ktmerge.merge.registry import stages
from ktmerge.merge.stage import Context

FUSED = "model.layers.0.self_attn.qkv_proj.weight"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


def merged(bench: Workbench, method: str, deltas: list[Tensor], name: str = MATRIX, **parameters: Any) -> Tensor:
    blend = {"method": method, **parameters}
    return bench.merged({"abcdef"[t]: {name: delta} for t, delta in enumerate(deltas)}, blend)[name]


def values(matrix: Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


def rank(matrix: Tensor, floor: float = 1e-5) -> int:
    found = values(matrix)
    return int((found > floor * found[0]).sum()) if found[0] > 0 else 0


def frames(outputs: int, inputs: int, count: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Columns at right angles, so many on each side."""
    left, _ = torch.linalg.qr(normal(outputs, count, seed=seed).double())
    right, _ = torch.linalg.qr(normal(inputs, count, seed=seed + 1).double())
    return left, right


def owners(outputs: int, inputs: int, count: int, each: int) -> list[Tensor]:
    """Experts at right angles to one another on both sides, of so many directions each."""
    left, right = frames(outputs, inputs, count * each)
    strengths = torch.linspace(1, 2, count * each).double()
    cuts = [slice(t * each, (t + 1) * each) for t in range(count)]
    return [((left[:, cut] * strengths[cut]) @ right[:, cut].T).float() for cut in cuts]


# --- DG-Hard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 60), (48, 120), (120, 48)])
@pytest.mark.parametrize("planted", [0, 1, 5])
def test_dg_hard_finds_the_planted_rank(bench: Workbench, shape: tuple[int, int], planted: int) -> None:
    left, right = frames(*shape, max(planted, 1))
    signal = (left * torch.linspace(60, 90, max(planted, 1)).double()) @ right.T * (planted > 0)
    found = merged(bench, "dg_hard", [signal.float() + normal(*shape, seed=9)])
    assert rank(found) == planted


def test_dg_hard_gives_the_base_where_nothing_stands_out(bench: Workbench) -> None:
    base = {MATRIX: normal(50, 40)}
    tuned = {MATRIX: base[MATRIX] + 1e-3 * normal(50, 40, seed=1)}
    assert bench.blend(base, {"a": tuned}, {"method": "dg_hard"})[MATRIX].equal(base[MATRIX])


def test_dg_hard_leaves_small_maps_alone(bench: Workbench) -> None:
    delta = normal(31, 33)
    assert merged(bench, "dg_hard", [delta]).equal(delta)
    assert not merged(bench, "dg_hard", [delta], min_numel=1023).equal(delta)


def test_noise_thresholds_are_the_published_ones() -> None:
    """omega / mu of arXiv:1305.5870, which gives 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43 to two digits."""
    for beta, shape in ((0.25, (100, 400)), (0.5, (100, 200)), (0.75, (300, 400)), (1.0, (100, 100))):
        factor = spectra.threshold(torch.ones(10), shape)
        assert factor == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)
    assert spectra.threshold(torch.ones(10), (100, 100)) == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize("beta", [1e-4, 0.1, 0.6, 0.999, 1.0])
def test_the_median_halves_the_distribution(beta: float) -> None:
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    angles = (np.arange(200_000) + 0.5) * np.pi / 200_000
    x = low + (high - low) * (1 - np.cos(angles)) / 2
    mass = (high - low) ** 2 * np.sin(angles) ** 2 / (8 * np.pi * beta * x) * np.pi / 200_000
    assert mass.sum() == pytest.approx(1, abs=1e-4)
    assert mass[x < spectra.marchenko_pastur_median(beta)].sum() == pytest.approx(0.5, abs=1e-4)


def test_the_median_wants_a_ratio() -> None:
    with pytest.raises(ValueError, match="ratio"):
        spectra.marchenko_pastur_median(1.5)


# --- truncation, STAR, Wiener -----------------------------------------------------------------------------------------


def test_head_and_tail_make_the_whole(bench: Workbench) -> None:
    delta = normal(14, 20)
    parts = [merged(bench, "svd_truncate", [delta], rule="rank", rank=4, keep=keep) for keep in ("head", "tail")]
    assert rank(parts[0]) == 4
    torch.testing.assert_close(parts[0] + parts[1], delta)
    assert float((parts[0] * parts[1]).sum().abs()) < 1e-3


@pytest.mark.parametrize("keep", ["head", "tail"])
def test_all_or_nothing_of_a_spectrum_is_exact(bench: Workbench, keep: str) -> None:
    delta = normal(6, 9)
    for whole, parameters in ((True, {"rule": "rank", "rank": 6}), (False, {"rule": "nuclear", "share": 0.0})):
        found = merged(bench, "svd_truncate", [delta], keep=keep, **parameters)
        assert found.equal(delta) if whole == (keep == "head") else not found.any()


def test_star_keeps_the_sum_of_singular_values(bench: Workbench) -> None:
    delta = normal(20, 30)
    found = merged(bench, "star", [delta], eta=0.4)
    assert 0 < rank(found) < 20
    assert values(found).sum() == pytest.approx(values(delta).sum(), rel=1e-5)


def test_wiener_shrinks_weak_directions_most_and_all_by_less_trust(bench: Workbench) -> None:
    delta = normal(20, 30)
    whole, last = values(delta), values(delta)
    for a in (0.9, 0.5, 0.1):
        found = values(merged(bench, "wiener", [delta], a=a))
        assert (found <= last + 1e-6).all()
        assert (np.diff(found / whole) < 0).all()
        last = found


def test_wiener_by_the_weights_spares_what_the_base_uses(bench: Workbench) -> None:
    """Of two equally strong changes, the one along inputs that the base's weights read shrinks more."""
    base = torch.zeros(4, 6)
    base[:, 0] = 3.0
    delta = torch.zeros(4, 6)
    delta[0, 0] = delta[1, 5] = 1.0
    stored = bench.blend({MATRIX: base}, {"a": {MATRIX: base + delta}}, {"method": "wiener", "prior": "weights"})
    change = stored[MATRIX] - base
    assert change[1, 5] == pytest.approx(1, abs=1e-6)
    assert change[0, 0] == pytest.approx(0.8 * 0.5 / (0.8 * 0.5 + 0.2), abs=1e-5)


# --- several experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tsv_m", "task_arithmetic_svc", "tsv_m_svc", "swudi_a_svc"])
def test_experts_at_right_angles_are_added(bench: Workbench, method: str) -> None:
    deltas = owners(15, 18, 3, 3)
    torch.testing.assert_close(merged(bench, method, deltas), sum(deltas), rtol=0, atol=2e-5)


def test_equal_experts_give_the_head_they_share(bench: Workbench) -> None:
    """With a full polar factor the doubled columns would add energy in arbitrary directions."""
    delta = normal(12, 9)
    u, s, v = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    for count in (2, 3, 4):
        k = 9 // count
        expected = torch.from_numpy((u[:, :k] * s[:k]) @ v[:k]).float()
        torch.testing.assert_close(merged(bench, "tsv_m", [delta] * count), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "soft_iso", "task_arithmetic_svc", "cart", "resmerge"])
def test_an_expert_that_left_a_map_alone_has_no_say(bench: Workbench, method: str) -> None:
    deltas = [normal(11, 8, seed=1), normal(11, 8, seed=2)]
    found = merged(bench, method, [deltas[0], torch.zeros(11, 8), deltas[1]], **{"lambda": 1.0})
    assert found.equal(merged(bench, method, deltas, **{"lambda": 1.0}))


def test_iso_c_makes_all_directions_equal(bench: Workbench) -> None:
    deltas = [normal(10, 16, seed=seed) for seed in range(3)]
    expected = values(sum(deltas))
    np.testing.assert_allclose(values(merged(bench, "iso_c", deltas)), expected.mean(), rtol=1e-5)
    soft = values(merged(bench, "soft_iso", deltas))
    np.testing.assert_allclose(soft / soft[0], np.sqrt(expected / expected[0]), rtol=1e-4)
    assert np.linalg.norm(soft) == pytest.approx(np.linalg.norm(expected), rel=1e-5)


@pytest.mark.parametrize(("power", "preserve"), [(0.0, "nuclear"), (0.5, "frobenius")])
def test_only_what_stands_out_from_noise_is_evened_out(bench: Workbench, power: float, preserve: str) -> None:
    left, right = frames(48, 60, 3)
    delta = ((left * torch.tensor([200.0, 120.0, 60.0])) @ right.T).float() + normal(48, 60, seed=9)
    before = values(delta)
    raised = before[:3] ** power
    raised *= (
        before[:3].sum() / raised.sum()
        if preserve == "nuclear"
        else np.linalg.norm(before[:3]) / np.linalg.norm(raised)
    )
    found = merged(bench, "iso_c", [delta], above="noise", power=power, preserve=preserve)
    np.testing.assert_allclose(values(found), [*raised, *before[3:]], rtol=1e-4)
    assert merged(bench, "iso_c", [normal(48, 60, seed=9)], above="noise").equal(normal(48, 60, seed=9))


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_one_expert_does_not_come_back_from_iso(bench: Workbench, method: str) -> None:
    """G3: documented, with its documented value: all singular values are the mean of the expert's."""
    delta = normal(10, 10)
    found = merged(bench, method, [delta])
    np.testing.assert_allclose(values(found), values(delta).mean(), rtol=1e-4)
    assert float((found - delta).norm()) > 0.1 * float(delta.norm())


@pytest.mark.parametrize(
    ("size", "experts", "each"), [(10, 2, 1), (10, 3, 1), (15, 2, 2), (5, 2, 0), (20, 8, 0), (25, 2, 2), (64, 3, 4)]
)
def test_specific_directions_are_rounded_half_to_even(size: int, experts: int, each: int) -> None:
    """round((r - floor(0.8 r)) / N): 1.0, 0.67, 1.5, 0.5, 0.5, 2.5, 4.33."""
    assert specific_count(size, 0.8, experts) == each


def test_iso_cts_without_room_for_specific_directions_is_iso_c(bench: Workbench) -> None:
    deltas = [normal(5, 7, seed=seed) for seed in range(4)]
    torch.testing.assert_close(merged(bench, "iso_cts", deltas), merged(bench, "iso_c", deltas), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["iso_c", "soft_iso", "iso_cts", "tsv_m", "tsv_m_svc"])
def test_nothing_is_added_outside_the_experts_spaces(bench: Workbench, method: str) -> None:
    """G17: of rank-deficient deltas a full polar factor would fill the rest with arbitrary directions."""
    left, right = frames(16, 12, 4)
    deltas = [(left @ normal(4, 4, seed=seed).double() @ right.T).float() for seed in range(3)]
    found = merged(bench, method, deltas).double()
    outside = found - left @ (left.T @ found @ right) @ right.T
    assert float(outside.norm()) < 1e-4 * float(found.norm())
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
@pytest.mark.parametrize("method", ["tsv_m_svc", "iso_c", "iso_cts", "knots", "cart", "resmerge", "star", "wiener"])
def test_odd_shapes_pass(bench: Workbench, method: str, shape: tuple[int, int]) -> None:
    deltas = [normal(*shape, seed=seed) for seed in range(3)]
    deltas[2] = -deltas[0]
    assert merged(bench, method, deltas).isfinite().all()


def test_knots_with_a_sum_is_task_arithmetic(bench: Workbench) -> None:
    deltas = [normal(10, 7, seed=seed) for seed in range(3)]
    assert merged(bench, "knots", deltas, rule="sum").equal(merged(bench, "task_arithmetic", deltas))


def test_knots_merges_shared_outputs_that_ties_would_tear_apart(bench: Workbench) -> None:
    """Experts that differ in inputs but share an output direction: what comes out lies along it."""
    direction = torch.linalg.qr(normal(12, 1))[0]
    deltas = [direction @ normal(1, 10, seed=seed) for seed in (1, 2)]
    found = merged(bench, "knots", deltas, density=0.5)
    assert rank(found) == 1
    assert float((found - direction @ (direction.T @ found)).norm()) < 1e-5 * float(found.norm())


def test_centred_parts_cancel(bench: Workbench) -> None:
    deltas = [normal(10, 7, seed=seed) for seed in range(3)]
    mean = sum(deltas) / 3
    for fraction in (0.0, 1.0):
        torch.testing.assert_close(merged(bench, "cart", deltas, fraction=fraction), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(bench, "cart", deltas, fraction=0.9999), mean, rtol=0, atol=1e-5)
    assert float((merged(bench, "cart", deltas, fraction=0.3) - mean).norm()) > 0.1


def test_resmerge_of_equal_experts_shortens_only_the_head(bench: Workbench) -> None:
    delta = normal(10, 7)
    u, s, v = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    head = torch.from_numpy(s[0] * np.outer(u[:, 0], v[0])).float()
    rest = delta - head
    expected = rest + 0.2 * float(rest.norm()) / float(head.norm()) * head
    torch.testing.assert_close(merged(bench, "resmerge", [delta, delta]), expected, rtol=0, atol=1e-5)


# --- calibration ------------------------------------------------------------------------------------------------------


def spelled(bench: Workbench, deltas: list[Tensor], combine: Any, calibrate: Any) -> Tensor:
    blend = {"stages": {"combine": combine, "calibrate": calibrate}}
    return bench.merged({"abcdef"[t]: {MATRIX: delta} for t, delta in enumerate(deltas)}, blend)[MATRIX]


@pytest.mark.parametrize("combine", ["sum", "mean", "tsv_m"])
def test_svc_gives_equal_experts_once_whatever_merged_them(bench: Workbench, combine: str) -> None:
    left, right = frames(9, 8, 2)
    delta = ((left * torch.tensor([2.0, 1.0]).double()) @ right.T).float()
    torch.testing.assert_close(spelled(bench, [delta] * 3, combine, "svc"), delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("alpha", "factor"), [(0.5, 1.0), (0.1, 1 / 0.6), (1.0, 0.5)])
def test_svc_of_a_mean_of_experts_at_right_angles(bench: Workbench, alpha: float, factor: float) -> None:
    """(sum tau) / (1/N + (N - 1) alpha) for alpha <= 1/N, and the mean for alpha = 1."""
    deltas = owners(9, 8, 2, 3)
    found = spelled(bench, deltas, "mean", {"svc": {"alpha": alpha}})
    torch.testing.assert_close(found, factor * sum(deltas), rtol=0, atol=1e-5)


ROUNDED: dict[str, dict[str, Any]] = {
    "sum": {"combine": "sum", "calibrate": {"svc": {"alpha": 1.0}}},
    "mean": {"combine": "mean", "calibrate": "svc"},
    "knots": {"combine": {"knots": {"density": 1.0}}},
}


@pytest.mark.parametrize("stages", ROUNDED.values(), ids=ROUNDED)
def test_the_rounding_of_a_larger_base_is_no_response(bench: Workbench, stages: dict[str, Any]) -> None:
    """Directions of nearly equal strength turn by it into other experts' and would be taken for theirs."""
    base = {MATRIX: normal(24, 20, seed=9)}
    for size in (0.1, 0.01):
        deltas = [size * one for one in owners(24, 20, 3, 6)]
        experts = {name: {MATRIX: base[MATRIX] + delta} for name, delta in zip("abc", deltas, strict=True)}
        found = bench.blend(base, experts, {"stages": stages, "lambda": 1.0})[MATRIX] - base[MATRIX]
        torch.testing.assert_close(found, sum(deltas), rtol=0, atol=2e-6)


def test_norm_budget_is_the_mean_length(bench: Workbench) -> None:
    deltas = [normal(9, 8, seed=seed) * (seed + 1) for seed in range(3)]
    found = spelled(bench, [*deltas, torch.zeros(9, 8)], "mean", "norm_budget")
    assert float(found.norm()) == pytest.approx(np.mean([float(one.norm()) for one in deltas]), rel=1e-6)
    direction = sum(deltas) / float(sum(deltas).norm())
    torch.testing.assert_close(found / found.norm(), direction, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_spectral_stages_spelled_out_leave_what_is_no_map(bench: Workbench) -> None:
    """Spectra are for linear maps; that all such stages see nothing else, the methods' properties say."""
    names = {MATRIX: (9, 8), "model.norm.weight": (8,), "model.embed_tokens.weight": (7, 8)}
    names["vision_tower.patch.weight"] = (4, 3, 2, 2)
    deltas = {e: {n: normal(*shape, seed=ord(e)) for n, shape in names.items()} for e in "ab"}
    for transform, combine in (("dg_hard", "tsv_m"), ("wiener", "knots")):
        found = bench.merged(deltas, {"stages": {"transform": transform, "combine": combine, "calibrate": "svc"}})
        for name in list(names)[1:]:
            torch.testing.assert_close(found[name], (deltas["a"][name] + deltas["b"][name]) / 2)


# --- maps inside tensors ----------------------------------------------------------------------------------------------


@pytest.mark.every(5)
@pytest.mark.parametrize("method", ["star", "tsv_m", "iso_c", "iso_cts", "task_arithmetic_svc", "cart", "knots"])
def test_fused_and_stacked_maps_are_merged_one_by_one(bench: Workbench, method: str) -> None:
    config = {"model_type": "phi3", "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    parts = [[normal(rows, 8, seed=10 * t + rows + n) for n, rows in enumerate((8, 4, 4))] for t in range(2)]
    stacks = [[normal(6, 8, seed=100 * t + n) for n in range(4)] for t in range(2)]  # 2 experts, gate and up
    models = {
        name: {FUSED: torch.cat(parts[t]), STACKED: torch.stack([torch.cat(stacks[t][:2]), torch.cat(stacks[t][2:])])}
        for t, name in enumerate("ab")
    }
    zeros = {name: torch.zeros_like(one) for name, one in models["a"].items()}
    # knots' ties are told apart by names only where there are any: here there are none
    blend = {"method": method, "lambda": 1.0}
    found, _ = bench.run(zeros, models, blend, config=config)
    single = [merged(bench, method, [parts[0][n], parts[1][n]], **{"lambda": 1.0}) for n in range(3)]
    torch.testing.assert_close(found[FUSED], torch.cat(single), rtol=0, atol=1e-6)
    single = [merged(bench, method, [stacks[0][n], stacks[1][n]], **{"lambda": 1.0}) for n in range(4)]
    expected = torch.stack([torch.cat(single[:2]), torch.cat(single[2:])])
    torch.testing.assert_close(found[STACKED], expected, rtol=0, atol=1e-6)
    whole, _ = bench.run(zeros, models, {**blend, "split_fused": False}, config=config)
    together = merged(bench, method, [torch.cat(one) for one in parts], **{"lambda": 1.0})
    torch.testing.assert_close(whole[FUSED], together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["knots", "iso_cts"])
def test_one_sided_methods_know_the_outputs_of_transposed_weights(bench: Workbench, method: str) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    deltas = [normal(12, 8, seed=seed) for seed in range(2)]
    models = {"ab"[t]: {name: delta.T.contiguous()} for t, delta in enumerate(deltas)}
    found, _ = bench.run(
        {name: torch.zeros(8, 12)}, models, {"method": method, "lambda": 1.0}, config={"model_type": "gpt2"}
    )
    torch.testing.assert_close(found[name].T, merged(bench, method, deltas, **{"lambda": 1.0}), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("stack", [(), (1,), (3,), (0,)])
@pytest.mark.parametrize("inputs", [1, 5, 0])
def test_maps_are_put_back_where_they_were(fused: bool, transposed: bool, stack: tuple[int, ...], inputs: int) -> None:
    outputs = (4, 2, 2)
    whole = normal(*stack, 8, inputs)
    values = whole.transpose(-1, -2).contiguous() if transposed else whole
    context = Context(
        tensor="x", part="llm", layers={}, tensor_class="matrix", shape=tuple(values.shape), start=0, seed=0,
        experts=("a",), weights=(1.0,), base=values, kernels=kernels_for(torch.device("cpu")),
        layout=MatrixLayout(transposed, outputs),
    )  # fmt: skip
    maps = matrices.split(values, context, fused=fused)
    stacked = whole if stack else whole[None]
    expected = [one for each in stacked for one in (each.split(outputs) if fused else [each])]
    assert len(maps) == (stack[0] if stack else 1) * (3 if fused else 1)
    assert all(a.equal(b) for a, b in zip(maps, expected, strict=True))
    assert matrices.join(maps, context, fused=fused).equal(values)


@pytest.mark.parametrize("method", ["dg_hard", "tsv_m", "iso_c", "task_arithmetic_svc", "resmerge"])
def test_empty_matrices_pass(bench: Workbench, method: str) -> None:
    for shape in ((0, 5), (4, 0)):
        assert merged(bench, method, [torch.zeros(shape)] * 2, MATRIX).shape == shape


# --- nothing arbitrary ------------------------------------------------------------------------------------------------

ALL = (
    "dg_hard", "svd_truncate", "star", "wiener", "tsv_m", "iso_c", "soft_iso", "iso_cts", "knots", "cart", "resmerge",
    "task_arithmetic_svc", "swudi_a_svc",
)  # fmt: skip


@pytest.mark.parametrize("method", ALL)
def test_signs_of_singular_vectors_do_not_matter(
    bench: Workbench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = [normal(40, 30, seed=seed) for seed in range(3)]
    first = merged(bench, method, deltas)
    generator = torch.Generator().manual_seed(1)
    exact = decompositions._eigh

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = exact(matrix)
        return values, vectors * (torch.randint(0, 2, values.shape, generator=generator).double() * 2 - 1)

    monkeypatch.setattr(decompositions, "_eigh", flipped)
    torch.testing.assert_close(
        merged(bench, method, deltas), first, rtol=0, atol=1e-6 * max(float(first.abs().max()), 1e-3)
    )


def test_few_directions_of_a_large_matrix_are_found_by_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_SMALL", 64)
    left, right = frames(200, 150, 6)
    matrix = ((left * torch.tensor([9.0, 8, 7, 6, 5, 4]).double()) @ right.T).float() + 0.01 * normal(200, 150)
    asked = []

    def draw(count: int) -> Tensor:
        asked.append(count)
        return normal(count, seed=3)

    for one in (matrix, matrix.T.contiguous()):
        exact, sampled = spectra.one_sided(one).top(4), spectra.top(one, 4, draw)
        torch.testing.assert_close(sampled.values, exact.values, rtol=1e-6, atol=0)
        torch.testing.assert_close(sampled.matrix(), exact.matrix(), rtol=0, atol=1e-5)
        assert spectra.top(one, 4, draw).matrix().equal(sampled.matrix())
    assert asked == [150 * 20] * 2 + [200 * 20] * 2
    assert spectra.top(matrix, 100, draw).values.numel() == 100  # many directions are decomposed
    assert len(asked) == 4


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
def test_what_is_done_in_a_frame_is_done_without_its_long_side(shape: tuple[int, int]) -> None:
    whole, other = normal(*shape, seed=1).double(), normal(*shape, seed=2).double()
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    found = spectra.one_sided(whole)
    for count in (0, 2, 5):
        core = torch.diag(torch.arange(1.0, count + 1, dtype=torch.float64))
        around = (left[:, :count] @ core) @ right[:count]
        torch.testing.assert_close(found.outer(core), around, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.filtered(core.diagonal() / values[:count]), around, rtol=0, atol=1e-10)
        across = left[:, :count].T @ other @ right[:count].T
        torch.testing.assert_close(found.inner(other, count).abs(), across.abs(), rtol=0, atol=1e-10)
        seen = found.coordinates(count)
        torch.testing.assert_close(seen.abs(), (left[:, :count].T @ whole).abs(), rtol=0, atol=1e-10)
        head = left[:, :count] @ left[:, :count].T @ whole
        torch.testing.assert_close(found.back(seen), head, rtol=0, atol=1e-10)
    assert found.above(float(values[2] / values[0]) * 0.999) == 3


@pytest.mark.parametrize(
    "stage", ["tsv_m", "isotropy", "iso_cts", "spectral_regmean", "cts", "cart", "resmerge", "knots", "opcm"]
)
@pytest.mark.parametrize("power", [-130, -80, 66, 110])
def test_huge_and_tiny_changes_are_merged_like_others(stage: str, power: int) -> None:
    base, *deltas = ((16 * normal(6, 8, seed=seed)).round() / 16 for seed in range(3))  # exact at every power

    def merge(factor: float) -> Tensor:
        context = Context(
            tensor="x", part="llm", layers={}, tensor_class="matrix", shape=(6, 8), start=0, seed=0, experts=("a", "b"),
            weights=(1.0, 1.0), base=_times(base, factor), kernels=kernels_for(torch.device("cpu")),
            layout=MatrixLayout(False, (6,)), statistics={"ratio": Normed(1.0, None)},
        )  # fmt: skip
        one = stages()[stage]
        settings = {"scope": "tensor"} if stage == "opcm" else {}
        found: Tensor = one.apply([_times(delta, factor) for delta in deltas], one.parameters(**settings), context)
        return found

    near, far = merge(1.0), merge(2.0**power)
    assert near.abs().max() > 0.1
    torch.testing.assert_close(far.double() / 2.0**power, near.double(), rtol=0, atol=1e-6 if power > -100 else 1e-4)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).float()
