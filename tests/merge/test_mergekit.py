"""mergekit as a backend: the same numbers where the maths agree, its own methods, its own complaints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_memory import MATRIX, Workbench, noise
from merge_models import Tensors, same_bytes

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge.planning import plan_blend

WEIGHTS = {"a": 1.0, "b": 0.25, "c": 0.5}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


def inputs(count: int = 3) -> tuple[Tensors, dict[str, Tensors]]:
    base = noise(0, 1.0)
    moved = {
        name: {key: base[key] + 0.02 * values for key, values in noise(n + 1, 1.0).items()}
        for n, name in enumerate("abc")
    }
    return base, dict(list(moved.items())[:count])


def theirs(method: str, base: Tensors, experts: dict[str, Tensors], with_base: bool, **parameters: Any) -> Tensors:
    from mergekit.merge_methods.api import merge_tensors

    found = {}
    for name in sorted(base):
        tensors = [experts[expert][name] for expert in sorted(experts)]
        ids = sorted(experts)
        if with_base:
            tensors, ids = [base[name], *tensors], ["base", *ids]
        found[name] = merge_tensors(
            tensors, method, parameters=parameters, ids=ids, base_index=0 if with_base else None, name=name
        )
    return found


@pytest.mark.parametrize(
    ("ours", "name", "parameters", "with_base"),
    [
        ({"method": "linear"}, "linear", {}, False),
        ({"method": "task_arithmetic", "lambda": 0.7}, "task_arithmetic", {"lambda": 0.7}, True),
        ({"method": "ties", "density": 1.0, "tie": "plus"}, "ties", {}, True),
        ({"method": "ties", "density": 1, "aggregate": "sum"}, "ties", {"normalize": False}, True),
        ({"method": "ties", "density": 0.3}, "ties", {"density": 0.3}, True),
    ],
)  # fmt: skip
def test_own_methods_agree_where_the_maths_do(
    bench: Workbench, ours: dict[str, Any], name: str, parameters: dict[str, Any], with_base: bool
) -> None:
    base, experts = inputs()
    stored = bench.blend(base, experts, ours, weights=WEIGHTS)
    expected = theirs(name, base, experts, with_base, weight=WEIGHTS, **parameters)
    for key in stored:
        torch.testing.assert_close(stored[key], expected[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "count", "parameters", "weighted", "with_base"),
    [
        ("slerp", 1, {"t": 0.3}, False, True),
        ("nuslerp", 2, {}, True, True),
        ("sce", 3, {"select_topk": 0.5}, False, True),
        ("breadcrumbs", 3, {"density": 0.4, "gamma": 0.05}, True, True),
        ("karcher", 3, {"max_iter": 20}, False, False),
        ("model_stock", 3, {}, False, True),
        ("ties", 3, {"density": {"a": 0.5, "b": 0.2, "c": 1.0}}, True, True),
    ],
)
def test_backend_gives_what_mergekit_gives(
    bench: Workbench, name: str, count: int, parameters: dict[str, Any], weighted: bool, with_base: bool
) -> None:
    base, experts = inputs(count)
    weights = {key: WEIGHTS[key] for key in experts}
    stored = bench.blend(base, experts, {"method": f"mergekit:{name}", **parameters}, weights=weights)
    given = {**parameters, **({"weight": weights} if weighted else {})}
    expected = theirs(name, base, experts, with_base, **given)
    for key in stored:
        torch.testing.assert_close(stored[key], expected[key], rtol=1e-6, atol=1e-6)


def test_random_methods_are_reproducible_and_seeded(bench: Workbench) -> None:
    base, experts = inputs(2)
    section = {"method": "mergekit:dare_ties", "density": 0.5}
    torch.manual_seed(1)
    first = bench.blend(base, experts, section, seed=3)
    state = torch.random.get_rng_state()
    second = bench.blend(base, dict(reversed(experts.items())), section, seed=3)
    assert state.equal(torch.random.get_rng_state())
    third = bench.blend(base, experts, section, seed=4)
    assert all(same_bytes(first[name], second[name]) for name in first)
    assert not first[MATRIX].equal(third[MATRIX])


@pytest.mark.parametrize(
    ("section", "count", "expected"),
    [
        ({"method": "mergekit:slrp", "t": 0.5}, 1, "mergekit has no method 'slrp'. Did you mean 'slerp'?"),
        ({"method": "mergekit:slerp"}, 1, "blend.t: 'mergekit:slerp' needs it"),
        ({"method": "mergekit:slerp", "t": 0.5, "tt": 1}, 1, "no parameter 'tt'"),
        ({"method": "mergekit:slerp", "t": "much"}, 1, "blend.t: must be a number, not 'much'"),
        ({"method": "mergekit:slerp", "t": 0.5}, 3, "exactly 2 inputs; got 4 (3 experts and the base given)"),
        ({"method": "mergekit:model_stock"}, 1, "at least 3 inputs"),
        ({"method": "mergekit:ties", "density": {"a": 0.5, "x": 1.0}}, 2, "one for each expert (a, b)"),
        ({"method": "mergkit:ties"}, 1, "there is no method 'mergkit:ties'"),
    ],
)
def test_mistakes(bench: Workbench, section: dict[str, Any], count: int, expected: str) -> None:
    base, experts = inputs(count)
    with pytest.raises(UsageError) as error:
        bench.blend(base, experts, section)
    assert expected in str(error.value)


def test_what_mergekit_complains_about_while_running_names_the_tensor(bench: Workbench) -> None:
    base, experts = inputs(2)
    with pytest.raises(KtmergeError, match=r"mergekit:della failed on 'model\..*Epsilon"):
        bench.blend(base, experts, {"method": "mergekit:della", "density": 0.9, "epsilon": 0.5})


def test_rules_change_its_parameters(bench: Workbench, llamas: Path, recipe_in: Any) -> None:
    section = {"method": "mergekit:slerp", "t": 0.0, "where": [{"match": "*mlp*", "t": 1.0}]}
    plan = plan_blend(recipe_in(llamas, {"a": ("a", 1.0)}, section))
    values = {t.name: t.pipeline.parameters()["t"] for t in plan.tensors if t.pipeline}
    assert {value for name, value in values.items() if "mlp" in name} == {1.0}
    assert {value for name, value in values.items() if "mlp" not in name} == {0.0}
