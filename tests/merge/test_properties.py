"""What every registered method promises: a new method is tested by being registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from merge_memory import EMBED, MATRIX, NORM, Workbench, noise
from merge_models import Tensors, same_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.errors import UsageError
from ktmerge.merge import general
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.registry import find_stage, methods, stages
from ktmerge.merge.settings import blend_setting
from ktmerge.merge.stage import KINDS, Context, Method, Stage
from ktmerge.recipes.schema import Blend

METHODS = list(methods().values())


Promise = Callable[[Workbench, Method], None]
PROMISES: list[tuple[Callable[[Method], Any], Promise]] = []
"""For which methods each promise is made, and what checks it."""


def promise(made: Callable[[Method], Any] = lambda method: True) -> Callable[[Promise], Promise]:
    """Check this of every method for which ``made`` is true."""

    def register(check: Promise) -> Promise:
        PROMISES.append((made, check))
        return check

    return register


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sixth", "others"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_promise_is_kept(bench: Workbench, method: Method, others: bool) -> None:
    """The functions below, each named as what it checks: of each method a sixth, of its neighbour the next one."""
    checks = [check for made, check in PROMISES if made(method)]
    for number, check in enumerate(checks, METHODS.index(method)):
        if (number % 6 > 0) == others:
            try:
                check(bench, method)
            except AssertionError as error:
                raise AssertionError(f"{check.__name__}: {error}") from error


def parameters_of(method: Method) -> set[str]:
    found: set[str] = set()
    for variant in (method.stages, *method.otherwise.values()):
        for kind in KINDS:
            uses = [variant.combine] if kind == "combine" else getattr(variant, kind)
            for name, _ in uses:
                found |= find_stage(name, kind).parameters.model_fields.keys()
    return found


def several(method: Method, seed: int = 1, **shapes: tuple[int, ...]) -> dict[str, Tensors]:
    count = min(3, method.experts[1] or 3)
    return {name: noise(seed + number, **shapes) for number, name in enumerate("abc"[:count])}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


def assert_same(first: Tensors, second: Tensors, tolerance: float = 0.0) -> None:
    """Equal bit for bit, or within a share of the tensor's largest value."""
    assert first.keys() == second.keys()
    for name in first:
        if tolerance and first[name].is_floating_point() and first[name].numel():
            largest = float(first[name].double().abs().max())
            torch.testing.assert_close(second[name], first[name], rtol=0, atol=tolerance * largest)
        else:
            assert same_bytes(first[name], second[name]), name


@promise(lambda method: method.promises.neutral is not None)
def keeping_everything_of_one_expert_is_the_expert(
    bench: Workbench, method: Method, dtype: torch.dtype = torch.bfloat16, rounding: str = "stochastic"
) -> None:
    base = {name: values.to(dtype) for name, values in noise(0, 1.0).items()}
    expert = {name: values.to(dtype) for name, values in noise(1, 0.7).items()}
    expert[MATRIX][0, 0] = -0.0
    blend = {"method": method.name, "lambda": 1.0, **(method.promises.neutral or {})}
    stored = bench.blend(base, {"a": expert}, blend, output={"rounding": rounding})
    step = 2.0**-7 if dtype == torch.bfloat16 else 0.0  # a value near the middle of two rounds either way
    assert_same(dict(sorted(expert.items())), stored, method.promises.tolerance and method.promises.tolerance + step)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_keeping_everything_in_other_types(bench: Workbench, method: Method, dtype: torch.dtype) -> None:
    if method.promises.neutral is not None:
        keeping_everything_of_one_expert_is_the_expert(bench, method, dtype, "nearest")


@promise()
def keeping_nothing_is_the_base(bench: Workbench, method: Method) -> None:
    dtype = torch.bfloat16
    base = {name: values.to(dtype) for name, values in noise(0, 1.0).items()}
    base[MATRIX][0, 0], base[NORM][0] = -0.0, -0.0
    experts = {name: {k: v.to(dtype) for k, v in tensors.items()} for name, tensors in several(method).items()}
    knobs: list[dict[str, Any]] = [{"lambda": 0.0}]
    if "density" in parameters_of(method) and not method.otherwise:
        knobs.append({"density": 0.0})
    if method.promises.nothing is not None:
        knobs.append({"lambda": 1.0, **method.promises.nothing})
    for knob in knobs:
        stored = bench.blend(base, experts, {"method": method.name, **knob}, output={"rounding": "stochastic"})
        assert_same(stored, dict(sorted(base.items())))


@promise(lambda method: method.experts[1] is None)
def identical_experts(bench: Workbench, method: Method) -> None:
    delta = noise(3)
    blend = {"method": method.name, **(method.promises.neutral or {})}
    merged = bench.merged({"a": delta, "b": delta, "c": delta}, blend)
    factor = {"mean": 1, "sum": 3}.get(method.promises.identical)
    for name, values in delta.items():
        if factor is not None:
            largest = float(values.abs().max())
            torch.testing.assert_close(
                merged[name], factor * values, rtol=5e-7, atol=method.promises.tolerance * largest
            )
        else:
            assert merged[name].isfinite().all()


@promise()
def experts_that_changed_nothing(bench: Workbench, method: Method) -> None:
    base = noise(0, 1.0)
    experts = several(method)
    same = bench.blend(base, dict.fromkeys(experts, base), {"method": method.name})
    assert_same(same, dict(sorted(base.items())))
    if len(experts) > 1:
        experts["b"] = base
        experts["a"] = {**experts["a"], MATRIX: base[MATRIX]}
        assert all(values.isfinite().all() for values in bench.blend(base, experts, {"method": method.name}).values())


@promise(lambda method: method.experts[1] is None and method.promises.experts)
def order_of_experts_changes_nothing(bench: Workbench, method: Method) -> None:
    deltas, weights = several(method), {"a": 1.0, "b": 0.3, "c": 0.7}
    if blend_setting(Blend(method=method.name)).objections(weights):
        weights = dict.fromkeys(weights, 1.0)
    first = bench.merged(deltas, {"method": method.name}, weights=weights)
    turned = {name: deltas[name] for name in ("c", "a", "b")}
    assert_same(first, bench.merged(turned, {"method": method.name}, weights=weights))


@promise(lambda method: method.experts[1] is None and method.promises.experts and method.name != "ema")
def an_expert_of_weight_0_might_as_well_not_be_there(bench: Workbench, method: Method) -> None:
    deltas, weights = several(method), {"a": 1.0, "b": 0.0, "c": 0.7}
    if blend_setting(Blend(method=method.name)).objections(weights):
        return
    for further in ({}, {"elect": "count", "aggregate": "wsum_over_count"}, {"elect": "mass", "tie": "majority"}):
        if takes(method, further):
            blend = {"method": method.name, **further}
            without = bench.merged({name: deltas[name] for name in "ac"}, blend, weights=weights)
            merged = bench.merged(deltas, blend, weights=weights)
            assert_same(without, merged, max(method.promises.tolerance, 1e-6))


@promise(lambda method: method.otherwise)
def a_lambda_above_1_is_for_what_the_method_is_for(bench: Workbench, method: Method) -> None:
    deltas = several(method)
    once, more = (bench.merged(deltas, {"method": method.name, "lambda": scale}) for scale in (1.0, 1.5))
    assert not once[MATRIX].equal(more[MATRIX]) or method.name in ("dg_hard", "exact_patch")
    for name, kind in ((NORM, "vector"), (EMBED, "embed")):
        assert once[name].equal(more[name]) == (kind in method.otherwise), name


@promise(lambda method: method.promises.scale or method.promises.sign)
def scaled_and_negated_deltas_give_such_a_merge(bench: Workbench, method: Method) -> None:
    deltas = several(method)
    deltas["a"][MATRIX][:2] = -deltas.get("b", deltas["a"])[MATRIX][:2]  # even votes too
    first = bench.merged(deltas, {"method": method.name})
    for factor in (*([4.0] if method.promises.scale else []), *([-1.0] if method.promises.sign else [])):
        changed = {name: scaled(own, factor) for name, own in deltas.items()}
        found, expected = bench.merged(changed, {"method": method.name}), scaled(first, factor)
        if factor < 0:
            found, expected = plus(found), plus(expected)
        assert_same(expected, found, method.promises.tolerance)


def scaled(tensors: Tensors, factor: float) -> Tensors:
    return {name: factor * values for name, values in tensors.items()}


def plus(tensors: Tensors) -> Tensors:
    """The same with one kind of zero."""
    return {name: values + 0.0 for name, values in tensors.items()}


def orthogonal(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@promise(lambda method: method.promises.rotations)
def turned_matrices_give_the_turned_merge(bench: Workbench, method: Method) -> None:
    deltas = {name: {MATRIX: tensors[MATRIX]} for name, tensors in several(method).items()}
    left, right = orthogonal(12, 1), orthogonal(10, 2)

    def turn(values: torch.Tensor) -> torch.Tensor:
        return (left @ values.double() @ right).float()

    first = turn(bench.merged(deltas, {"method": method.name})[MATRIX])
    turned = {name: {MATRIX: turn(tensors[MATRIX])} for name, tensors in deltas.items()}
    second = bench.merged(turned, {"method": method.name})[MATRIX]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5 * float(first.abs().max()))


@promise(lambda method: method.promises.elements)
def shuffled_elements_give_the_shuffled_merge(bench: Workbench, method: Method) -> None:
    deltas = several(method)
    order = torch.randperm(deltas["a"][MATRIX].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = {
        name: {**tensors, MATRIX: tensors[MATRIX].view(-1)[order].view_as(tensors[MATRIX])}
        for name, tensors in deltas.items()
    }
    first = bench.merged(deltas, {"method": method.name})[MATRIX]
    second = bench.merged(shuffled, {"method": method.name})[MATRIX]
    assert first.view(-1)[order].view_as(first).equal(second)


@promise(lambda method: "scope" in parameters_of(method))
def one_tensor_is_the_whole_model(bench: Workbench, method: Method) -> None:
    deltas = {name: {MATRIX: tensors[MATRIX]} for name, tensors in several(method).items()}
    local = bench.merged(deltas, {"method": method.name, "scope": "tensor"})
    assert_same(local, bench.merged(deltas, {"method": method.name, "scope": "global"}))


def takes(method: Method, parameters: dict[str, Any]) -> bool:
    try:
        blend_setting(Blend.model_validate({"method": method.name, **parameters}))
    except UsageError:
        return False
    return True


VARIATIONS: list[dict[str, str]] = [{}, {"scope": "global"}, {"tie": "majority"}, {"rescale": "l2"}]
VARIED = [(method, one) for method in METHODS for one in VARIATIONS if takes(method, one)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "variation"), VARIED, ids=[f"{m.name}-{'-'.join(v.values())}" for m, v in VARIED])
def test_size_of_pieces_changes_nothing(bench: Workbench, method: Method, variation: dict[str, str]) -> None:
    """Pieces shorter than a row, and of several rows, with a shorter one at the end."""
    shapes = {MATRIX: (7, 8), EMBED: (4, 5)}
    base = {name: values.bfloat16() for name, values in noise(0, 1.0, **shapes).items()}
    experts = {
        name: {key: (base[key].float() + values).bfloat16() for key, values in tensors.items()}
        for name, tensors in several(method, **shapes).items()
    }
    blend, output = {"method": method.name, **variation}, {"rounding": "stochastic"}
    whole = bench.blend(base, experts, blend, output=output)
    for chunk in (7, 24):
        assert_same(whole, bench.blend(base, experts, blend, output=output, chunk=chunk))


@pytest.mark.slow
@pytest.mark.parametrize("method", [one for one in METHODS if one.promises.unbiased], ids=lambda method: method.name)
def test_expectation_is_that_of_keeping_everything(bench: Workbench, method: Method) -> None:
    deltas = {name: {MATRIX: tensors[MATRIX]} for name, tensors in several(method).items()}
    exact = bench.merged(deltas, {"method": method.name, **(method.promises.neutral or {})})[MATRIX].double()
    draws = torch.stack(
        [bench.merged(deltas, {"method": method.name}, seed=seed)[MATRIX].double() for seed in range(120)]
    )
    error = draws.std(0) / draws.shape[0] ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all()


@promise(lambda method: "trim" in dict(method.stages.transform) and not method.stages.calibrate)
def exactly_as_many_stay_however_many_tie(bench: Workbench, method: Method) -> None:
    generator = torch.Generator().manual_seed(2)
    ulp = 2.0**-20
    names = {MATRIX: (40, 25), NORM: (33,), EMBED: (16, 16)}
    for density, scope in product((0.05, 0.2, 0.5, 0.9), ("tensor", "global")):
        values = {name: ulp * torch.randint(-2, 3, shape, generator=generator).float() for name, shape in names.items()}
        merged = bench.merged({"a": values}, {"method": method.name, "density": density, "scope": scope})
        groups = [[name] for name in names] if scope == "tensor" else [list(names)]
        for group in groups:
            total = sum(values[name].numel() for name in group)
            changed = sum(int(values[name].count_nonzero()) for name in group)
            kept = sum(int(merged[name].count_nonzero()) for name in group)
            assert kept == min(int(density * total), changed)


@promise()
def odd_tensors_pass(bench: Workbench, method: Method) -> None:
    odd: Tensors = {
        "model.layers.0.gate": torch.tensor(0.5),
        "model.layers.0.empty": torch.empty(0),
        "model.layers.0.one.weight": torch.ones(1, 1),
        "model.layers.0.experts.down_proj": torch.randn(2, 3, 4),
        "vision_tower.patch.conv.weight": torch.randn(2, 3, 2, 2),
        "model.position_ids": torch.arange(4),
        "model.mask": torch.tensor([True, False]),
        MATRIX: torch.randn(3, 4),
    }
    moved = {name: values + 0.25 if values.is_floating_point() else values for name, values in odd.items()}
    blend = {"method": method.name, "lambda": 1.0, **(method.promises.neutral or {})}
    stored = bench.blend(odd, dict.fromkeys("abc"[: method.experts[0]], moved), blend)
    if method.promises.neutral is not None:
        assert_same(stored, dict(sorted(moved.items())))
    assert all(values.isfinite().all() for values in stored.values())


class HalfPrecisionSpy(TorchDispatchMode):
    """Finds arithmetic done in half precision."""

    MAY = ("_to_copy", "to.", "view", "slice", "detach", "clone", "empty", "alias", "reshape", "copy_")

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        halves = [a for a in args if isinstance(a, torch.Tensor) and a.dtype in (torch.float16, torch.bfloat16)]
        if halves and not any(word in operation.__name__ for word in self.MAY):
            raise AssertionError(f"{operation.__name__} in half precision")
        return operation(*args, **(kwargs or {}))


@promise()
def nothing_is_computed_in_half_precision(bench: Workbench, method: Method) -> None:
    """On one core, since the spy sees its own thread only."""
    base = {name: values.bfloat16() for name, values in noise(0, 1.0).items()}
    experts = {name: {k: v.bfloat16() for k, v in tensors.items()} for name, tensors in several(method).items()}
    with HalfPrecisionSpy(), patch.object(general, "cores", lambda: 1):
        bench.blend(base, experts, {"method": method.name})


@pytest.mark.parametrize("stage", stages().values(), ids=stages())
def test_stages_are_pure(stage: Stage) -> None:
    deltas = [noise(number)[MATRIX] for number in range(3)]
    merged, base = noise(9)[MATRIX], noise(10)[MATRIX]
    if stage.reach == "element":
        deltas, merged, base = [delta.view(-1) for delta in deltas], merged.view(-1), base.view(-1)
    copies = [delta.clone() for delta in (*deltas, merged, base)]
    parameters = stage.parameters()
    context = Context(
        tensor=MATRIX, part="llm.layers[0]", layers={"llm": 2}, tensor_class="matrix", shape=(12, 10), start=0, seed=1,
        experts=("a", "b", "c"), weights=(1.0, 1.0, 1.0), base=base, kernels=kernels_for(torch.device("cpu")),
        expert="a" if stage.kind == "transform" else "", layout=MatrixLayout(False, (12,)),
        measured=RandomMeasurements(), deltas=tuple(delta.view(-1) for delta in deltas),
    )  # fmt: skip
    values: dict[str, tuple[Any, ...]] = {"transform": (deltas[0],), "combine": (deltas,), "scale": (merged,)}
    inputs = values.get(stage.kind, (merged, deltas))
    found = {}
    for statistic in stage.statistics(parameters):
        observer = statistic.observer(deltas[0].numel())
        while not observer.done:
            observer.observe(inputs[0], context)
            observer.end_pass()
        found[statistic.name] = observer.result()
    ready = replace(context, statistics=found)
    first, second = (stage.apply(*inputs, parameters, ready) for _ in range(2))
    assert first.equal(second)
    assert first.shape == merged.shape
    assert all(a.equal(b) for a, b in zip((*deltas, merged, base), copies, strict=True))


def test_stages_for_maps_see_nothing_else() -> None:
    """They need not ask what they are given, be it in a method or where a recipe spells them out."""
    spelled: list[dict[str, Any]] = [{"method": method.name} for method in METHODS]
    for name, stage in stages().items():
        if stage.on_maps:
            spelled.append({"stages": {"combine": "mean", stage.kind: [name]}})
    for blend in spelled:
        pipelines = blend_setting(Blend.model_validate(blend)).pipelines
        others = [use.stage for kind in ("embed", "vector", "conv") for use in pipelines[kind].uses]
        assert not [one.name for one in others if one.on_maps], blend


class RandomMeasurements:
    """Of a matrix of 12 outputs and 10 inputs."""

    def inputs(self, expert: str = "") -> torch.Tensor:
        return torch.randn(40, 10, generator=torch.Generator().manual_seed(len(expert)))

    def fisher(self, expert: str = "") -> torch.Tensor:
        return torch.rand(12, 10, generator=torch.Generator().manual_seed(len(expert)))

    def fisher_norm(self, expert: str = "") -> float:
        return 3.0


def test_methods_and_stages_describe_themselves() -> None:
    for method in METHODS:
        assert method.summary.endswith("."), method.name
        assert len(method.summary) <= 130, method.name
        assert method.source, method.name
    for name, stage in stages().items():
        assert stage.summary, name
        assert all(field.description for field in stage.parameters.model_fields.values()), name
