"""What sets the methods of one tuned model apart: counts, chances, caps and choices where the answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from merge_memory import EMBED, MATRIX, NORM, Workbench, noise
from merge_models import Tensors, same_bytes
from torch import Tensor

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.methods.half_reset import is_kept
from ktmerge.merge.methods.soup import ema_shares
from ktmerge.merge.registry import find_stage
from ktmerge.merge.rows import by_row
from ktmerge.merge.stage import Context, Kind

ULP = 2.0**-20


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


def tied(shape: tuple[int, ...], seed: int = 2) -> Tensor:
    """Values from 0, 1 and 2 ulp of either sign."""
    generator = torch.Generator().manual_seed(seed)
    return ULP * torch.randint(-2, 3, shape, generator=generator).float()


def context(shape: tuple[int, ...] = (12, 10), **changes: Any) -> Context:
    fields: dict[str, Any] = {
        "tensor": MATRIX, "part": "llm.layers[0]", "layers": {"llm": 1}, "tensor_class": "matrix", "shape": shape,
        "start": 0, "seed": 1, "experts": ("a",), "weights": (1.0,), "base": torch.zeros(shape),
        "kernels": kernels_for(torch.device("cpu")), "expert": "a", "layout": None,
    }  # fmt: skip
    return Context(**fields | changes)


def apply(name: str, kind: Kind, values: Any, where: Context, **parameters: Any) -> Tensor:
    """A stage, of a tensor in one piece."""
    stage = find_stage(name, kind)
    chosen = stage.parameters(**parameters)
    found = dict(where.statistics)
    for statistic in stage.statistics(chosen):
        observer = statistic.observer(where.base.numel())
        while not observer.done:
            observer.observe(values, where)
            observer.end_pass()
        found.setdefault(statistic.name, observer.result())
    return stage.apply(values, chosen, replace(where, statistics=found))


class TestLines:
    def test_layers_are_those_of_the_block_whatever_other_numbers_a_name_has(self) -> None:
        names = [f"blocks.{layer}.mlp.{step}.weight" for layer in range(12) for step in (0, 2, 11)]
        names += [f"model.layers.{layer}.mlp.experts.{one}.up_proj.weight" for layer in range(3) for one in range(5)]
        for prefix, count in (("blocks", 12), ("model.layers", 3)):
            parts = Parts([name for name in names if name.startswith(prefix)], {})
            for name in (name for name in names if name.startswith(prefix)):
                layer = int(name.removeprefix(prefix + ".").split(".")[0])
                (stack,) = parts.layers
                assert parts.layers[stack] == count
                found = apply(
                    "lines", "scale", torch.ones(1), context(part=parts.of(name), layers=parts.layers), alpha=0.0
                )
                assert float(found) == pytest.approx(layer / (count - 1), abs=1e-7)

    def test_ramp(self) -> None:
        def factor(part: str, **parameters: Any) -> float:
            where = context(part=part, layers={"llm": 5, "vision": 3, "audio": 1})
            return float(apply("lines", "scale", torch.ones(1), where, **parameters))

        ramp = [factor(f"llm.layers[{layer}]", alpha=0.25) for layer in range(5)]
        assert ramp == sorted(ramp)
        assert ramp == pytest.approx([0.25, 0.4375, 0.625, 0.8125, 1.0])
        assert factor("vision.layers[1]", alpha=0.25) == pytest.approx(0.625)
        assert factor("audio.layers[0]", alpha=0.25, beta=0.5) == 0.25
        assert {factor("llm.layers[3]", alpha=0.25, beta=0.0), factor("head", alpha=0.25)} == {0.25}
        assert factor("head", alpha=0.25, beta=0.5, outside="alpha+beta") == 0.75

    def test_no_slope_is_linear(self, bench: Workbench) -> None:
        deltas = {"a": noise(1)}
        flat = bench.merged(deltas, {"method": "lines", "alpha": 0.5, "beta": 0.0})
        linear = bench.merged(deltas, {"method": "linear", "lambda": 0.5})
        assert all(flat[name].equal(linear[name]) for name in flat)

    @pytest.mark.parametrize("chunk", [7, 1 << 20])
    def test_auto_is_one_over_the_number_of_experts_for_a_sum(self, bench: Workbench, chunk: int) -> None:
        deltas = {name: noise(number) for number, name in enumerate("abcd")}
        stages = {"combine": "sum", "scale": {"lines": {"alpha": "auto", "beta": 0.0}}}
        merged = bench.merged(deltas, {"stages": stages}, chunk=chunk)
        plain = bench.merged(deltas, {"method": "task_arithmetic", "lambda": 0.25})
        assert all(merged[name].equal(plain[name]) for name in merged)

    def test_auto_counts_the_experts_that_have_a_weight(self, bench: Workbench) -> None:
        deltas = {name: noise(number) for number, name in enumerate("abc")}
        stages = {"combine": "sum", "scale": {"lines": {"alpha": "auto", "beta": 0.0}}}
        merged = bench.merged(deltas, {"stages": stages}, weights={"b": 0.0})
        plain = bench.merged(deltas, {"method": "task_arithmetic", "lambda": 0.5}, weights={"b": 0.0})
        assert all(merged[name].equal(plain[name]) for name in merged)

    def test_auto_restores_the_norm_of_the_sum(self, bench: Workbench) -> None:
        deltas = {name: noise(number) for number, name in enumerate("abc")}
        stages = {"transform": "trim", "combine": "elect", "scale": {"lines": {"alpha": "auto", "beta": 0.0}}}
        merged = bench.merged(deltas, {"stages": stages})
        total = sum(float(sum(one[name] for one in deltas.values()).abs().sum()) for name in merged)  # type: ignore
        assert sum(float(one.abs().sum()) for one in merged.values()) == pytest.approx(total / 3, rel=1e-5)


class TestBreadcrumbs:
    @pytest.mark.parametrize("scope", ["tensor", "row", "global"])
    def test_without_outliers_it_is_trim(self, bench: Workbench, scope: str) -> None:
        deltas = {"a": {MATRIX: tied((40, 25)), EMBED: tied((16, 16), 3)}}
        for density in (0.03, 0.2, 0.9):
            blend = {"density": density, "scope": scope}
            crumbs = bench.merged(deltas, {"method": "breadcrumbs", "gamma": 0.0, **blend})
            trimmed = bench.merged(deltas, {"method": "trim", **blend})
            assert all(crumbs[name].equal(trimmed[name]) for name in crumbs)

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 9, 64, 99, 130])
    def test_counts_are_exact_in_the_smallest_tensors(self, bench: Workbench, size: int) -> None:
        for density, gamma in ((0.2, 0.01), (0.5, 0.3), (0.7, 0.6), (1.0, 0.2), (0.9, 0.01)):
            values = torch.full((1, size), ULP)
            blend = {"method": "breadcrumbs", "density": density, "gamma": gamma}
            merged = bench.merged({"a": {MATRIX: values}}, blend)[MATRIX]
            assert int(merged.count_nonzero()) == math.floor(density * size)

    def test_the_largest_go_first(self, bench: Workbench) -> None:
        values = torch.arange(1.0, 101.0).view(10, 10)
        merged = bench.merged({"a": {MATRIX: values}}, {"method": "breadcrumbs", "density": 0.2, "gamma": 0.05})
        assert merged[MATRIX][merged[MATRIX] > 0].tolist() == list(range(76, 96))

    def test_norms_keep_everything(self, bench: Workbench) -> None:
        deltas = {"a": noise(1)}
        assert bench.merged(deltas, {"method": "breadcrumbs", "density": 0.05})[NORM].equal(deltas["a"][NORM])


class TestRows:
    @pytest.mark.parametrize("density", [0.1, 0.34, 0.5, 0.97])
    def test_every_row_keeps_its_count_however_many_tie(self, density: float) -> None:
        values = tied((30, 11))
        kept = apply("trim", "transform", values, context((30, 11)), density=density, scope="row")
        wanted = (values != 0).sum(1).clamp(max=math.floor(density * 11))
        assert (kept != 0).sum(1).equal(wanted)
        assert not (kept != 0).all(0).any()  # the tie is not broken by position

    def test_rows_are_outputs_however_a_map_is_stored(self) -> None:
        values = noise(1)[MATRIX]
        plain = apply("trim", "transform", values, context(), scope="row", density=0.3)
        turned = context((10, 12), layout=MatrixLayout(True, (12,)))
        assert apply("trim", "transform", values.T.contiguous(), turned, scope="row", density=0.3).equal(plain.T)
        stacked = context((2, 12, 10), layout=MatrixLayout(False, (6, 6)))
        both = apply("trim", "transform", torch.stack([values, -values]), stacked, scope="row", density=0.3)
        assert both[0].equal(plain)
        assert both[1].equal(-plain)

    def test_kernels_and_vectors_are_rows_too(self) -> None:
        seen: list[tuple[int, ...]] = []

        def look(rows: Tensor, ranks: Tensor, elements: Tensor) -> Tensor:
            seen.append(tuple(rows.shape))
            return rows

        for shape, kind in (((4, 3, 2, 2), "conv"), ((7,), "vector"), ((), "vector"), ((1, 5, 8), "embed")):
            values = torch.randn(shape)
            assert by_row(values, context(shape, tensor_class=kind), 0, look).equal(values)
        assert seen == [(4, 12), (1, 7), (1, 1), (5, 8)]
        empty = torch.empty(3, 0)
        assert by_row(empty, context((3, 0)), 0, look).equal(empty)


class TestDella:
    def test_without_a_window_it_is_dare(self, bench: Workbench) -> None:
        deltas = {name: noise(number) for number, name in enumerate("ab")}
        for density in (0.13, 0.5, 0.9):
            della = bench.merged(deltas, {"method": "della_linear", "density": density, "epsilon": 0.0})
            dare = bench.merged(deltas, {"method": "dare", "density": density})
            assert all(della[name].equal(dare[name]) for name in della)

    def test_larger_changes_are_never_less_likely_kept(self) -> None:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        draws = 20000
        values = torch.arange(1.0, 9.0)[order].expand(draws, 8) * torch.linspace(-1, 1, draws).unsqueeze(1)
        kept = apply("magprune", "transform", values, context((draws, 8)), density=0.5, epsilon=0.4, rescale="none")
        chances = (kept != 0).float().mean(0)[order.argsort()]
        exact = torch.linspace(0.1, 0.9, 8)
        assert ((chances - exact).abs() <= 5 * (exact * (1 - exact) / draws).sqrt()).all()
        assert (chances.diff() > 0).all()

    def test_every_element_of_equal_ones_has_a_rank_of_its_own(self) -> None:
        values = torch.full((1, 9), ULP)
        seen = apply("magprune", "transform", values, context((1, 9)), density=0.5, epsilon=0.45)
        factors = (seen / ULP)[seen != 0]
        assert factors.unique().numel() == factors.numel()

    def test_rows_of_one_element_and_scalars(self) -> None:
        for shape in ((), (1,), (6, 1), (1, 1)):
            values = torch.ones(shape)
            kind = "matrix" if len(shape) > 1 else "vector"
            pruned = apply("magprune", "transform", values, context(shape, tensor_class=kind), density=0.5)
            assert set(pruned.reshape(-1).tolist()) <= {0.0, 2.0}

    def test_the_scalar_keeps_the_sum_of_magnitudes(self) -> None:
        values = noise(3)[MATRIX]
        pruned = apply("magprune", "transform", values, context(), density=0.4, rescale="scalar")
        assert float(pruned.abs().sum()) == pytest.approx(float(values.abs().sum()), rel=1e-6)

    @pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.95, 0.1), (0.5, 0.5)])
    def test_chances_outside_the_unit_are_refused(self, bench: Workbench, density: float, epsilon: float) -> None:
        with pytest.raises(UsageError, match="take epsilon below"):
            bench.merged({"a": noise(1)}, {"method": "della", "density": density, "epsilon": epsilon})


class Inputs:
    """Measurements of a map of 10 inputs."""

    def __init__(self, scale: float = 1.0) -> None:
        self.values = scale * torch.randn(50, 10, generator=torch.Generator().manual_seed(3))

    def inputs(self, expert: str = "") -> Tensor:
        return self.values

    def fisher(self, expert: str = "") -> Tensor:
        raise AssertionError

    def fisher_norm(self, expert: str = "") -> float:
        raise AssertionError


class TestDarexQ:
    def test_q_from_density_to_one(self, bench: Workbench) -> None:
        deltas = {"a": {MATRIX: noise(1)[MATRIX]}}
        plain = bench.merged(deltas, {"method": "dare", "density": 0.25, "rescale": "none"})[MATRIX]
        unbiased = bench.merged(deltas, {"method": "dare", "density": 0.25})[MATRIX]

        def at(q: float) -> Tensor:
            return bench.merged(deltas, {"method": "dare", "density": 0.25, "rescale": "q", "q": q})[MATRIX]

        assert at(1.0).equal(plain)
        assert at(0.25).equal(unbiased)
        assert at(0.5).equal(2 * plain)

    @pytest.mark.parametrize(
        "blend", [{"rescale": "q"}, {"rescale": "q", "q": 0.2}, {"rescale": "q", "q": 1.5}, {"q": 0.6}]
    )
    def test_other_q_are_refused(self, bench: Workbench, blend: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match=r"rescale:? q|at most 1 or analytic"):
            bench.merged({"a": noise(1)}, {"method": "dare", "density": 0.25, **blend})

    @pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
    def test_the_analytic_q_minimises_the_bound_of_every_output(self, density: float) -> None:
        values = torch.cat([noise(1)[MATRIX], noise(2)[MATRIX].abs()])
        values[12:, 3:] *= 0.01
        values[18:] = values[18:].sort(dim=1).values[:, :1]  # a large sum of small terms: no room for a bias
        where = context((24, 10), measured=Inputs())
        kept = apply("dare", "transform", values, where, density=density, rescale="none")
        scaled = apply("dare", "transform", values, where, density=density, rescale="q", q="analytic")
        found = float(kept.double().norm() / scaled.double().norm())
        c = values.double().numpy() * abs(Inputs().values.double().numpy()).mean(0)
        p = 1 - density
        phi = 0.5 if p == 0.5 else (1 - 2 * p) / np.log((1 - p) / p)
        q = np.linspace(density, 1, 41)[:, None]
        eta = np.geomspace(1e-2, 1e5, 4001)[None]
        best = []
        for row in c:
            bound = abs(row.sum()) * (1 - density / q) + eta * phi * (row**2).sum() / (4 * q**2) + np.log(40) / eta
            best.append(float(q[bound.min(1).argmin(), 0]))
        assert found == pytest.approx(np.mean(best), rel=1e-5)

    def test_the_analytic_q_needs_measured_inputs(self, bench: Workbench) -> None:
        expert = {name: values + 0.01 for name, values in noise(0, 1.0).items()}
        blend = {"method": "dare", "density": 0.2, "rescale": "q", "q": "analytic"}
        stored = bench.blend(noise(0, 1.0), {"a": expert}, blend)
        assert stored[NORM].equal(expert[NORM])
        assert not stored[MATRIX].equal(expert[MATRIX])


class TestClip:
    def test_no_tensor_changes_by_more_than_its_share(self, bench: Workbench) -> None:
        base = noise(0, 1.0)
        expert = {name: values + noise(1, 0.3)[name] for name, values in base.items()}
        expert[NORM] = base[NORM] + 1e-4
        for rho in (0.01, 0.1):
            stored = bench.blend(base, {"a": expert}, {"method": "clip", "rho": rho})
            for name, values in base.items():
                assert float((stored[name] - values).norm()) <= rho * float(values.norm()) * (1 + 1e-5)
            assert same_bytes(stored[NORM], expert[NORM])
            assert float((stored[MATRIX] - base[MATRIX]).norm()) == pytest.approx(
                rho * float(base[MATRIX].norm()), 1e-4
            )

    def test_singular_values_are_capped_one_map_at_a_time(self) -> None:
        base = torch.cat([noise(0, 1.0)[MATRIX], noise(1, 0.1)[MATRIX]])
        delta = torch.cat([noise(2, 0.5)[MATRIX], noise(3, 0.5)[MATRIX]])
        where = context((24, 10), base=base, layout=MatrixLayout(False, (12, 12)))
        stage = find_stage("clip", "guard")
        merged = stage.apply(delta, [delta], stage.parameters(cap="spectral", rho=0.2), where)
        for own, capped, before in zip(base.split(12), merged.split(12), delta.split(12), strict=True):
            limit = 0.2 * torch.linalg.svdvals(own)[0]
            wanted = torch.linalg.svdvals(before).clamp(max=float(limit))
            torch.testing.assert_close(torch.linalg.svdvals(capped), wanted, rtol=1e-4, atol=1e-6)
        kept = stage.apply(delta, [delta], stage.parameters(cap="spectral", rho=1e6), where)
        assert kept.equal(delta)
        assert not stage.apply(delta, [delta], stage.parameters(cap="spectral", rho=0.0), where).any()

    @pytest.mark.parametrize("quantile", [0.0, 0.3, 0.95, 1.0])
    def test_elements_are_capped_at_a_quantile(self, bench: Workbench, quantile: float) -> None:
        deltas = {"a": noise(1)}
        merged = bench.merged(deltas, {"method": "clip", "cap": "quantile", "quantile": quantile}, chunk=16)
        for name, values in deltas["a"].items():
            ordered = values.abs().reshape(-1).sort().values
            rank = math.ceil(round(quantile * len(ordered), 6))
            limit = float(ordered[rank - 1]) if rank else 0.0
            assert merged[name].equal(values.clamp(-limit, limit))

    def test_nearswap_is_mergekits_formula(self, bench: Workbench) -> None:
        deltas = {"a": noise(1)}
        merged = bench.merged(deltas, {"method": "nearswap", "t": 0.004})
        for name, values in deltas["a"].items():
            torch.testing.assert_close(merged[name], (0.004 / values.abs()).clamp(0, 1) * values)


def attention(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.self_attn.{kind}_proj.weight"


class TestHalfReset:
    def test_two_of_four_and_half_of_the_rest(self) -> None:
        for seed in range(20):
            gated = []
            for layer in range(6):
                assert sum(bool(is_kept(seed, attention(layer, kind), kind)) for kind in "qkvo") == 2
                names = {kind: f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
                gated.append(sum(bool(is_kept(seed, name, kind)) for kind, name in names.items()))
                plain = {"up": f"vision.layers.{layer}.mlp.fc1.weight", "down": f"vision.layers.{layer}.mlp.fc2.weight"}
                assert sum(bool(is_kept(seed, name, kind)) for kind, name in plain.items()) == 1
                bert = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
                prefix = f"encoder.layer.{layer}.attention"
                assert sum(bool(is_kept(seed, f"{prefix}.{one}.weight", kind)) for kind, one in bert.items()) == 2
            assert sorted(gated) == [1, 1, 1, 2, 2, 2]

    @pytest.mark.slow
    def test_every_projection_is_kept_for_half_of_the_seeds(self) -> None:
        draws = 2000
        for kind in "qkvo":
            kept = sum(bool(is_kept(seed, attention(3, kind), kind)) for seed in range(draws))
            assert abs(kept - draws / 2) <= 5 * math.sqrt(draws) / 2
        kept = sum(bool(is_kept(seed, "model.layers.3.mlp.gate_proj.weight", "gate")) for seed in range(draws))
        assert abs(kept - draws / 2) <= 5 * math.sqrt(draws) / 2

    def test_a_fused_tensor_gets_what_its_maps_would(self) -> None:
        for seed in range(12):
            name = "model.layers.0.self_attn.qkv_proj.weight"
            where = context((12, 4), tensor=name, seed=seed, layout=MatrixLayout(False, (6, 3, 3)))
            kept = apply("half_reset", "transform", torch.ones(12, 4), where)
            for kind, rows in zip("qkv", kept.split((6, 3, 3)), strict=True):
                assert bool(rows.all()) == bool(rows.any()) == is_kept(seed, attention(0, kind), kind)

    def test_biases_go_with_their_maps(self, bench: Workbench) -> None:
        """Of GPT-2, whose projections lie along the columns; pieces cut within what the maps share."""
        weight, bias = "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"
        deltas = {"a": {weight: torch.ones(4, 12), bias: torch.ones(12)}}
        config = {"model_type": "gpt2", "hidden_size": 4, "num_attention_heads": 2}
        mixed = 0
        for seed in range(8):
            merged = bench.merged(deltas, {"method": "half_reset"}, seed=seed, config=config, chunk=5)
            assert merged[weight][0].equal(merged[bias])
            mixed += bool(merged[bias].any()) and not bool(merged[bias].all())
        assert mixed

    def test_the_rest_is_the_bases_or_the_experts(self, bench: Workbench) -> None:
        deltas = {"a": noise(1)}
        base = bench.merged(deltas, {"method": "half_reset"})
        expert = bench.merged(deltas, {"method": "half_reset", "others": "expert"})
        for name in (NORM, EMBED):
            assert not base[name].any()
            assert expert[name].equal(deltas["a"][name])

    def test_half_of_the_elements_is_dare(self, bench: Workbench) -> None:
        deltas = {"a": {MATRIX: noise(1)[MATRIX]}}
        half = bench.merged(deltas, {"method": "half_reset", "mode": "element"}, chunk=7)
        assert half[MATRIX].equal(bench.merged(deltas, {"method": "dare", "rescale": "none"})[MATRIX])


class TestSpider:
    def test_neither_the_size_of_the_weights_nor_of_the_changes_matters(self) -> None:
        base, delta = noise(0, 1.0)[MATRIX], noise(1)[MATRIX]
        first = apply("spider", "transform", delta, context(base=base))
        assert apply("spider", "transform", delta, context(base=8 * base)).equal(first)
        assert apply("spider", "transform", 0.25 * delta, context(base=base)).equal(0.25 * first)
        torch.testing.assert_close(apply("spider", "transform", 3 * delta, context(base=base)), 3 * first)
        share = float((first != 0).float().mean())
        assert 0.3 < share < 0.7

    def test_more_is_asked_of_a_change_as_kappa_grows(self) -> None:
        base, delta = noise(0, 1.0)[MATRIX], noise(1)[MATRIX]
        where = context(base=base)
        counts = [
            int(apply("spider", "transform", delta, where, kappa=k).count_nonzero()) for k in (-1.0, 0.0, 0.2, 1.0)
        ]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == 120
        assert counts[-1] == 0

    def test_untouched_elements_count_where_their_rank_beats_the_weights(self) -> None:
        base, delta = torch.tensor([[0.0, 4.0, 4.0, 4.0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        sizes = {"before": base.double(), "after": delta.double()}
        rank = {k: ((v - v.mean()) / v.std(correction=0)).sigmoid() for k, v in sizes.items()}
        share = torch.where(rank["after"] > rank["before"], rank["after"] / (rank["before"] + rank["after"]), 0.0)
        assert share.count_nonzero() == 2  # the base's smallest weight, though it did not change, and the change
        expected = (share / (share.sum() / 2)).clamp(max=1) * delta
        torch.testing.assert_close(apply("spider", "transform", delta, context((1, 4), base=base)), expected.float())

    def test_tensors_without_spread(self) -> None:
        for shape in ((1, 1), (3, 4)):
            where = context(shape, base=torch.ones(shape))
            assert not apply("spider", "transform", torch.zeros(shape), where).any()
            assert not apply("spider", "transform", torch.full(shape, 0.5), where).any()


def feed_forward(seed: int, neurons: int = 20, wide: int = 6) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (neurons, wide), "up": (neurons, wide), "down": (wide, neurons)}
    prefix = "model.layers.0.mlp"
    return {
        f"{prefix}.{kind}_proj.weight": 0.01 * torch.randn(shape, generator=generator) for kind, shape in shapes.items()
    }


def heads(seed: int, queries: int, keys: int, size: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    wide = queries * size
    shapes = {"q": (wide, wide), "k": (keys * size, wide), "v": (keys * size, wide), "o": (wide, wide)}
    return {attention(0, kind): 0.01 * torch.randn(shape, generator=generator) for kind, shape in shapes.items()}


class TestNeuronFusion:
    def test_the_projections_of_a_neuron_share_its_fate(self, bench: Workbench) -> None:
        deltas = feed_forward(1)
        gate, up, down = deltas.values()
        merged = bench.merged({"a": deltas}, {"method": "neuron_fusion", "rho": 0.3, "gamma": 0.0})
        masks = [one.any(1) for one in list(merged.values())[1:]] + [
            merged["model.layers.0.mlp.down_proj.weight"].any(0)
        ]
        scores = (gate**2).sum(1) + (up**2).sum(1) + (down**2).sum(0)
        wanted = torch.zeros(20, dtype=torch.bool)
        wanted[scores.topk(6).indices] = True
        assert all(mask.equal(wanted) for mask in masks)

    @pytest.mark.parametrize("alpha", [0.6, 1.0])
    def test_the_strength_of_a_module_is_restored(self, bench: Workbench, alpha: float) -> None:
        for deltas in (feed_forward(1), heads(2, 4, 4)):
            merged = bench.merged({"a": deltas}, {"method": "neuron_fusion", "alpha": alpha, "gamma": 0.2})
            before, after = (sum(float(one.double().square().sum()) for one in x.values()) for x in (deltas, merged))
            assert math.sqrt(after / before) == pytest.approx(alpha, rel=1e-5)

    def test_neurons_in_another_order(self, bench: Workbench) -> None:
        deltas = feed_forward(3)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
        turned = {name: one[:, order] if "down" in name else one[order] for name, one in deltas.items()}
        first = bench.merged({"a": deltas}, {"method": "neuron_fusion"})
        second = bench.merged({"a": turned}, {"method": "neuron_fusion"})
        for name, one in first.items():
            torch.testing.assert_close(second[name], one[:, order] if "down" in name else one[order], rtol=1e-6, atol=0)

    def test_gate_and_up_in_one_tensor(self, bench: Workbench) -> None:
        gate, up, down = feed_forward(4).values()
        fused = {
            "model.layers.0.mlp.gate_up_proj.weight": torch.cat([gate, up]),
            "model.layers.0.mlp.down_proj.weight": down,
        }
        merged = bench.merged({"a": feed_forward(4)}, {"method": "neuron_fusion"})
        both = bench.merged({"a": fused}, {"method": "neuron_fusion"})["model.layers.0.mlp.gate_up_proj.weight"]
        assert both.equal(
            torch.cat([merged["model.layers.0.mlp.gate_proj.weight"], merged["model.layers.0.mlp.up_proj.weight"]])
        )

    def test_whole_heads_with_the_keys_they_share(self, bench: Workbench) -> None:
        deltas = heads(5, 4, 2)
        deltas[attention(0, "v")][4:] *= 3  # the second pair of heads moved most
        blend = {"method": "neuron_fusion", "rho": 0.5, "gamma": 0.0, "head_size": 4}
        merged = bench.merged({"a": deltas}, blend)
        for kind, half in (("q", 8), ("k", 4), ("v", 4)):
            assert not merged[attention(0, kind)][:half].any()
            assert merged[attention(0, kind)][half:].all()
        assert not merged[attention(0, "o")][:, :8].any()
        assert merged[attention(0, "o")][:, 8:].all()

    def test_without_the_size_of_a_head_keys_have_neurons_of_their_own(self, bench: Workbench) -> None:
        merged = bench.merged({"a": heads(6, 4, 2)}, {"method": "neuron_fusion", "rho": 0.25, "gamma": 0.0})
        rows = {kind: merged[attention(0, kind)].any(1) for kind in "qkv"}
        assert rows["k"].equal(rows["v"])
        assert rows["q"].equal(merged[attention(0, "o")].any(0))
        assert (int(rows["q"].sum()), int(rows["k"].sum())) == (4, 2)


class TestAverages:
    def test_a_share_for_the_base_is_a_smaller_lambda(self, bench: Workbench) -> None:
        deltas = {name: noise(number) for number, name in enumerate("abc")}
        soup = bench.merged(deltas, {"method": "soup", "base_weight": 1.0})
        linear = bench.merged(deltas, {"method": "linear", "lambda": 0.75})
        for name, values in soup.items():
            torch.testing.assert_close(values, linear[name], rtol=1e-5, atol=1e-9)

    def test_the_latest_checkpoint_counts_most_and_numbers_go_by_value(self, bench: Workbench) -> None:
        steps = {f"step{number}": {MATRIX: torch.full((2, 2), float(number))} for number in (900, 1000, 20)}
        assert bench.merged(steps, {"method": "ema", "beta": 0.0})[MATRIX].unique().tolist() == [1000.0]
        merged = bench.merged(steps, {"method": "ema", "beta": 0.5})[MATRIX]
        assert float(merged[0, 0]) == pytest.approx((1000 + 450 + 5) / 1.75)
        flat = bench.merged(steps, {"method": "ema", "beta": 1.0})[MATRIX]
        assert float(flat[0, 0]) == pytest.approx(640)

    def test_nothing_to_divide_by(self, bench: Workbench) -> None:
        deltas = {"a": noise(1), "b": noise(2)}
        for blend in ({"method": "soup"}, {"method": "ema", "beta": 1.0}):
            with pytest.raises(UsageError, match="which is 0"):
                bench.merged(deltas, blend, weights={"a": 1.0, "b": -1.0})

    def test_expo_goes_on_beyond_the_expert(self, bench: Workbench) -> None:
        deltas = {"a": noise(1)}
        base = {name: torch.zeros_like(values) for name, values in deltas["a"].items()}
        stored = bench.blend(base, deltas, {"method": "expo"})
        assert all(stored[name].equal(1.2 * values) for name, values in deltas["a"].items())


class TestBands:
    @pytest.mark.parametrize("scope", ["tensor", "global"])
    def test_two_bands_are_trim(self, bench: Workbench, scope: str) -> None:
        deltas = {"a": {MATRIX: tied((40, 25)), EMBED: tied((16, 16), 3)}}
        bands = bench.merged(deltas, {"method": "bands", "coefficients": [0.0, 1.0], "scope": scope})
        trimmed = bench.merged(deltas, {"method": "trim", "density": 0.5, "scope": scope})
        assert all(bands[name].equal(trimmed[name]) for name in bands)

    def test_bands_are_equally_full_however_many_tie(self, bench: Workbench) -> None:
        values = torch.full((7, 11), ULP)
        merged = bench.merged({"a": {MATRIX: values}}, {"method": "bands", "coefficients": [1.0, 2.0, 3.0, 4.0]})
        counts = (merged[MATRIX] / ULP).unique(return_counts=True)[1].tolist()
        assert counts == [19, 19, 19, 20]

    def test_one_element(self, bench: Workbench) -> None:
        merged = bench.merged({"a": {MATRIX: torch.ones(1, 1)}}, {"method": "bands", "coefficients": [0.0, 0.5, 2.0]})
        assert float(merged[MATRIX]) == 2.0


class TestOneBit:
    def test_the_scale_has_the_least_squared_error(self, bench: Workbench) -> None:
        values = noise(1)[MATRIX]
        merged = bench.merged({"a": {MATRIX: values}}, {"method": "bitdelta"}, chunk=7)[MATRIX]
        assert merged.sign().equal(values.sign())
        errors = [float((scale * merged - values).norm()) for scale in (0.99, 1.0, 1.01)]
        assert min(errors) == errors[1]


class TestArceeFusion:
    def test_what_stands_out_stays_at_any_scale(self) -> None:
        values = noise(1, 1e-5)[MATRIX]
        values[3] *= 20
        kept = apply("arcee_fusion", "transform", values, context())
        assert kept[3].count_nonzero() >= 8
        assert kept.count_nonzero() <= kept[3].count_nonzero() + 12
        for scale in (1024.0, 2.0**-120, 2.0**120):
            assert apply("arcee_fusion", "transform", scale * values, context()).equal(scale * kept)


FACTOR = "a number of at least -1e+38 and at most 1e+38"


@pytest.mark.parametrize(
    ("blend", "words"),
    [
        ({"method": "lines", "alpha": "most"}, f"blend.alpha: must be {FACTOR} or auto, not 'most'"),
        (
            {"method": "dare", "rescale": "q", "q": "best"},
            "blend.q: must be a number above 0 and at most 1 or analytic or null, not 'best'",
        ),
        (
            {"method": "bands", "coefficients": 1.0},
            f"blend.coefficients: must be a list of one or more, each {FACTOR}, not 1",
        ),
        (
            {"method": "bands", "coefficients": [10**400]},
            f"blend.coefficients: must be a list of one or more, each {FACTOR}, not 100",
        ),
        (
            {"method": "neuron_fusion", "head_size": 0},
            "blend.head_size: must be a whole number or null of at least 1, not 0",
        ),
    ],
)
def test_what_a_parameter_may_be(bench: Workbench, blend: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        bench.merged({"a": noise(1)}, blend)
    assert words in str(error.value)


def test_checkpoints_are_in_the_order_of_their_numbers_however_long() -> None:
    names = ["step1000", "step900", f"step{'9' * 5000}", "step0900", "last"]
    shares = dict(zip(names, ema_shares(0.5, names, [1.0] * 5), strict=True))
    assert sorted(names, key=shares.__getitem__) == ["last", "step0900", "step900", "step1000", f"step{'9' * 5000}"]
