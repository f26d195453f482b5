"""Every method, every tensor, two families: blended folders against float64 computations written from the formulas."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_models import Tensors, llava_tensors, read, write
from merge_oracles import assert_rounded, delta_arrays, merged_deltas

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.merge import blend
from ktmerge.merge.registry import methods

# Weights of sign elections are powers of two, so that even votes are even in float32 and float64 alike.
Case = tuple[str, dict[str, Any], dict[str, float], float]
CASES: list[Case] = [
    ("linear", {}, {"a": 1.0}, 0.5),
    ("linear", {}, {"a": 1.0, "b": 3.0, "c": -1.0}, 1.0),
    ("task_arithmetic", {}, {"a": 1.0, "b": 0.5}, 0.3),
    ("task_arithmetic", {}, {"a": 1.0, "b": -0.5, "c": 2.0}, 1.1),
    ("trim", {"density": 0.3}, {"b": 1.0}, 0.7),
    ("trim", {"density": 0.1, "scope": "global"}, {"a": 1.0}, 1.0),
    ("ties", {}, {"a": 1.0, "b": 1.0, "c": 1.0}, 1.0),
    ("ties", {"density": 0.4, "scope": "global"}, {"a": 0.5, "b": 2.0, "c": 1.0}, 0.8),
    ("ties", {"density": 0.9, "elect": "mass", "aggregate": "mean"}, {"a": 1.0, "b": 1.0}, 1.0),
    ("ties", {"density": 0.9, "elect": "count", "aggregate": "sum", "tie": "plus"}, {"a": 1.0, "b": 1.0}, 0.4),
    ("ties", {"density": 0.9, "elect": "count", "aggregate": "max", "tie": "majority"}, {"a": 1.0, "b": 1.0}, 0.4),
    (
        "ties",
        {"density": 0.8, "elect": "count", "tie": "majority", "scope": "global", "aggregate": "wsum_over_count"},
        {"a": 1.0, "b": 0.25},
        1.0,
    ),
    ("dare", {}, {"a": 1.0, "b": 1.0}, 1.0),
    ("dare", {"density": 0.3, "rescale": "l1"}, {"a": 1.0, "b": -0.5}, 0.6),
    ("dare", {"density": 0.3, "rescale": "l2"}, {"c": 1.0}, 1.0),
    ("dare_ties", {"density": 0.6, "rescale": "none"}, {"a": 1.0, "b": 2.0, "c": 1.0}, 1.0),
    ("dare_ties", {"density": 0.5}, {"a": 1.0, "b": 1.0}, 1.0),
]
FAMILIES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("oracles_*.py"))]
"""Further families of methods: each has CASES, and merged_deltas, float64, giving all merged deltas and a tolerance."""
OWNERS = {case[0]: family for family in FAMILIES for case in family.CASES}
CASES += [case for family in FAMILIES for case in family.CASES]
IDS = [f"{method}-{'-'.join(map(str, parameters.values()))}-{len(weights)}" for method, parameters, weights, _ in CASES]


MEASURED: set[str] = {
    "cgm",
    "cgm_hard",
    "cstar",
    "cts_guard",
    "diag_back",
    "exact_patch",
    "fisher",
    "fisher_back",
    "guarded",
    "model_tailor",
    "model_tailor_paper",
    "nullspace",
    "regmean",
    "regmean_back",
    "ties_base",
}
"""Methods that need measured statistics; their oracles are in files of their own."""


def test_every_method_has_an_oracle() -> None:
    assert {method for method, *_ in CASES} | MEASURED == set(methods())


def check(folder: Path, out: Path, experts: dict[str, dict[str, Any]], case: tuple[Any, ...], recipe_in: Any) -> None:
    method, parameters, weights, lambda_ = case
    chosen = {name: (name, weight) for name, weight in weights.items()}
    recipe = recipe_in(folder, chosen, {"method": method, "lambda": lambda_, **parameters}, seed=7)
    blend(recipe, out, device="cpu")
    base, stored = read(folder / "base"), read(out)
    assert stored.keys() == base.keys()
    header = Checkpoint.open(folder / "base")
    classes = {name: tensor_class(name, info, header.config) for name, info in header.tensors.items()}
    deltas = {name: delta_arrays(base, experts[name]) for name in weights}
    family = OWNERS.get(method)
    if family is None:
        merged, tolerance = merged_deltas(method, deltas, weights, 7, classes, **parameters), 0.0
    else:
        own = {name: values.double().numpy() for name, values in base.items() if values.is_floating_point()}
        merged, tolerance = family.merged_deltas(method, own, deltas, weights, 7, classes, **parameters)
    for name, values in base.items():
        assert stored[name].dtype == values.dtype
        if not values.is_floating_point():
            assert stored[name].equal(values)
            continue
        own = values.double().numpy()
        terms = sum(abs(weight * deltas[expert][name]) for expert, weight in weights.items())
        factor = lambda_
        if classes[name] in methods()[method].otherwise:
            factor = max(-1.0, min(1.0, lambda_))
        scale = abs(own) + abs(factor) * (terms + abs(merged[name]))
        # decompositions in float32 err by a share of the whole matrix
        scale = scale + tolerance * 2.0**22 * float(abs(merged[name]).max(initial=0))
        assert_rounded(stored[name], own + factor * merged[name], scale, name)
        untouched = merged[name] == 0
        assert (stored[name].double().numpy()[untouched] == values.double().numpy()[untouched]).all(), name


@pytest.fixture(scope="module")
def tuned_llamas(llamas: Path) -> dict[str, Tensors]:
    return {name: read(llamas / name) for name in "abc"}


def first_of(kind: Callable[[str], str]) -> Iterator[Any]:
    """All cases; the first of each kind of method is a unit test, the others are slow."""
    seen: set[str] = set()
    for case, name in zip(CASES, IDS, strict=True):
        marks = [pytest.mark.slow] if kind(case[0]) in seen else []
        yield pytest.param(case, id=name, marks=marks)
        seen.add(kind(case[0]))


def family_of(case: Case) -> str:
    return "" if case[0] not in OWNERS else OWNERS[case[0]].__name__


@pytest.mark.every(10)
@pytest.mark.parametrize("case", first_of(str))
def test_llama_equals_the_formulas(
    llamas: Path, tuned_llamas: dict[str, Tensors], tmp_path: Path, recipe_in: Any, case: tuple[Any, ...]
) -> None:
    experts = {name: tuned_llamas[name] for name in case[2]}
    check(llamas, tmp_path / "out", experts, case, recipe_in)


@pytest.mark.every(4)
@pytest.mark.parametrize("case", first_of(lambda method: getattr(OWNERS.get(method), "__name__", "")))
def test_llava_equals_the_formulas_whatever_the_names(
    llavas: Path, tmp_path: Path, recipe_in: Any, case: tuple[Any, ...]
) -> None:
    published = list(llava_tensors("published", buffers=False))
    namings = {"a": "published", "b": "saved", "c": "modules"}
    experts = {}
    for name, naming in namings.items():
        tensors = read(llavas / name)
        experts[name] = {
            there: tensors[own] for there, own in zip(published, llava_tensors(naming, buffers=False), strict=True)
        }
    check(llavas, tmp_path / "out", experts, case, recipe_in)


ODD: dict[str, tuple[int, ...]] = {
    "model.layers.0.gate": (),
    "model.layers.0.one.weight": (1, 1),
    "model.layers.0.row.weight": (1, 9),
    "model.layers.0.column.weight": (9, 1),
    "model.layers.0.experts.w": (3, 4, 5),
    "model.layers.0.mlp.up_proj.weight": (7, 6),
    "model.layers.1.mlp.up_proj.weight": (13, 11),
    "model.layers.1.still.weight": (4, 5),
    "model.layers.1.norm.weight": (8,),
    "vision.patch.conv.weight": (2, 3, 2, 2),
    "model.embed_tokens.weight": (6, 5),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts of tensors of odd shapes: one moved in few steps, so that most ties, one by nobody, some by two."""
    folder, generator = tmp_path_factory.mktemp("odd"), torch.Generator().manual_seed(4)
    base = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in ODD.items()}
    tied = "model.layers.1.mlp.up_proj.weight"
    base[tied] = torch.randint(-40, 41, ODD[tied], generator=generator) / 128
    for dtype, kind in DTYPES.items():
        write(folder / dtype / "base", {name: values.to(kind) for name, values in base.items()})
    for number, expert in enumerate("abc"):
        frozen = {list(ODD)[7], list(ODD)[2 * number + 1], list(ODD)[2 * number + 2]}
        deltas = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in ODD.items()}
        deltas[tied] = torch.randint(-2, 3, ODD[tied], generator=generator) / 128
        moved = {name: values if name in frozen else values + deltas[name] for name, values in base.items()}
        for dtype, kind in DTYPES.items():
            write(folder / dtype / expert, {name: values.to(kind) for name, values in moved.items()})
    return folder


def knows_maps(case: Case) -> bool:
    spectral = family_of(case) in ("oracles_spectral", "oracles_regression") or case[1].get("cap") == "spectral"
    return spectral or case[0] == "opcm"


@pytest.mark.every(8)
@pytest.mark.parametrize("case", [one for one in first_of(str) if not knows_maps(one.values[0])])
def test_tensors_of_odd_shapes_equal_the_formulas(
    odd: Path, tmp_path: Path, recipe_in: Any, case: tuple[Any, ...]
) -> None:
    """Of methods that do not know linear maps; those that do have theirs beside."""
    for dtype in DTYPES:
        folder = odd / dtype
        check(folder, tmp_path / dtype, {name: read(folder / name) for name in case[2]}, case, recipe_in)


def test_what_travels_with_the_weights(llavas: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llavas, {"b": ("b", 1.0)}, {"method": "linear"})
    report = blend(recipe, tmp_path / "out", device="cpu")
    files = {str(path.relative_to(llavas / "base")) for path in (llavas / "base").rglob("*") if path.is_file()}
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == files | {"ktmerge.json", "ktmerge.lock.yaml", "README.md"}
    base, out = Checkpoint.open(llavas / "base"), Checkpoint.open(tmp_path / "out")
    assert [(i.name, i.dtype, i.shape, i.file) for i in out.tensors.values()] == [
        (i.name, i.dtype, i.shape, i.file) for i in base.tensors.values()
    ]
    assert set(report.out) == set(base.weight_files)
    assert any("other names" in note for note in report.notes)


def test_bf16_massive_ties_are_really_there(llamas: Path) -> None:
    """The oracle's exact tie rule is only tested if bf16 deltas tie: make sure they do."""
    base = read(llamas / "base")
    delta = np.abs(delta_arrays(base, read(llamas / "a"))["model.layers.0.mlp.up_proj.weight"]).reshape(-1)
    threshold = np.sort(delta)[::-1][int(0.2 * delta.size) - 1]
    assert (delta == threshold).sum() > 5
