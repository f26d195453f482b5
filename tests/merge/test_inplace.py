"""A sweep's way into a loaded model: prepared once, from memory to memory, and still the bytes of the files' way."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_models import Model, read, same_bytes, write

from ktmerge.checkpoints.header import TensorInfo
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend, blend_into
from ktmerge.merge.flow import Flow
from ktmerge.merge.inexact import inexact_places
from ktmerge.merge.merged import MergedDeltas
from ktmerge.merge.multi_tensor import MultiTensor
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.pristine import HostReader, Pristine
from ktmerge.merge.replanning import Planner

TWO = {"a": ("a", 0.7), "b": ("b", 0.4)}
ONE = {"a": ("a", 1.0)}
BLENDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (ONE, {"method": "linear"}),
    (TWO, {"method": "task_arithmetic"}),
    (TWO, {"method": "ties", "density": 0.3, "scope": "tensor"}),
    (TWO, {"method": "ties", "density": 0.3, "where": [{"part": "norm", "keep": "b"}]}),
    (TWO, {"method": "dare_ties", "density": 0.5}),
    (TWO, {"method": "magmax"}),
    (ONE, {"stages": {"combine": "sum", "guard": [{"clip": {"cap": "norm", "rho": 0.05}}]}}),
    (ONE, {"method": "dg_hard"}),
    (TWO, {"method": "tsv_m"}),
]


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.bfloat16, "stochastic"),
        pytest.param(torch.bfloat16, "nearest", marks=pytest.mark.slow),
        pytest.param(torch.float32, "stochastic", marks=pytest.mark.slow),
        pytest.param(torch.float32, "nearest", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "blends", [BLENDS[::2], pytest.param(BLENDS[1::2], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_any_number_of_candidates_equal_the_files(
    dtype: torch.dtype, rounding: str, blends: Any, llamas: Path, tmp_path: Path, recipe_in: Any
) -> None:
    """Whatever is kept from one candidate to the next: plans, thresholds, merged deltas."""
    model, sources = Model(read(llamas / "base"), dtype), Pristine()
    for number, (experts, given) in enumerate(blends):
        for lambda_ in (1.0, 0.4):
            recipe = recipe_in(llamas, experts, {**given, "lambda": lambda_}, output={"rounding": rounding})
            report = blend_into(model, recipe, sources)
            wanted = blend(recipe, tmp_path / f"{number}-{lambda_}", device="cpu")
            stored, found = read(tmp_path / f"{number}-{lambda_}"), model.state_dict()
            assert all(same_bytes(found[name], values.to(dtype)) for name, values in stored.items()), (given, lambda_)
            for own, other in zip(report.tensors, wanted.tensors, strict=True):
                assert (own.name, own.what, own.changed, own.kept) == (
                    other.name,
                    other.what,
                    other.changed,
                    other.kept,
                )
                own_sums, other_sums = ((one.intended, one.base, one.along) for one in (own, other))
                assert own_sums == pytest.approx(other_sums, rel=1e-4, abs=1e-12)


def test_a_tensor_goes_through_its_stages_once(llamas: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources = Model(read(llamas / "base"), torch.float32), Pristine()
    taken: list[str] = []
    merged = Flow.merged

    def counted(self: Flow, tensor: Any) -> Any:
        taken.append(tensor.name)
        return merged(self, tensor)

    monkeypatch.setattr(Flow, "merged", counted)
    for lambda_ in (1.0, 0.3):
        blend_into(model, recipe_in(llamas, ONE, {"method": "dg_hard", "lambda": lambda_}), sources)
    assert taken
    assert len(taken) == len(set(taken))
    blend_into(model, recipe_in(llamas, {"a": ("a", 0.5)}, {"method": "dg_hard"}), sources)
    assert len(taken) == 2 * len(set(taken))  # another weight is another delta


def test_merged_deltas_make_room_for_newer_ones() -> None:
    held = MergedDeltas(most=48)
    first, second, third = (("", "", name) for name in ("first", "second", "third"))
    for key in (first, second):
        made = held.begin(key, 6)
        assert made is not None
        made.filled = 6
    assert held.get(first) is not None  # used last
    assert held.begin(third, 6) is not None
    assert held.get(second) is None
    assert held.get(first) is not None
    assert held.get(third) is None  # not whole yet
    assert held.begin(("", "", "too large"), 13) is None


def test_plans_are_the_same_without_reading_headers_again(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    folder = tmp_path / "models"
    shutil.copytree(llamas, folder)
    planner = Planner()
    blends: list[dict[str, Any]] = [
        {"method": "linear", "lambda": 0.2},
        {"method": "ties", "where": [{"part": "norm", "keep": "a"}, {"match": "*mlp*", "lambda": 0.1}]},
        {"method": "linear", "lambda": 0.9},
    ]
    first = None
    for given in blends:
        recipe = recipe_in(folder, TWO, given)
        plan = planner.plan(recipe)
        assert plan.to_json() == plan_blend(recipe).to_json()
        assert first is None or plan.base is first
        first = plan.base
    config = folder / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert planner.plan(recipe_in(folder, TWO, blends[0])).base is not first


CANDIDATES: list[dict[str, Any]] = [
    {"method": "linear", "lambda": 0.3},
    {"method": "task_arithmetic", "lambda": 1.0},
    {"method": "linear", "lambda": 1.7, "where": [{"part": "norm", "keep": "a"}, {"match": "*mlp*", "lambda": 0}]},
    *({"method": "ties", "scope": "tensor", "density": one, "lambda": 0.9} for one in (0.3, 0.5, 0.31, 0.0, 1.0)),
    *({"method": "ties", "scope": "global", "density": density} for density in (0.3, 0.12, 0.45)),
    {"method": "dg_hard", "lambda": 0.5},
    {"method": "dg_hard", "lambda": 1.0, "where": [{"match": "*mlp*", "keep": "base"}]},
    {"method": "breadcrumbs", "density": 0.5, "lambda": 0.8},
    *({"method": "bands", "lambda": lambda_} for lambda_ in (0.8, 0.4)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expert", "weight", "output"),
    [
        ("bfloat16", 1.0, {}),
        ("float32", 1.0, {}),
        ("float32", 0.7, {"dtype": "float32"}),
        ("float32", 1.0, {"rounding": "stochastic"}),
    ],
)
def test_candidates_that_are_not_measured_equal_the_files(
    expert: str, weight: float, output: dict[str, Any], llamas: Path, tmp_path: Path, recipe_in: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In any order, so that what is kept of one never shows in another; with and without equal magnitudes.

    Pieces are so small that tensors take several.
    """
    monkeypatch.setattr("ktmerge.merge.multi_tensor.PIECE", 256)
    shutil.copytree(llamas, tmp_path / "models")
    if expert == "float32":
        draw = torch.Generator().manual_seed(5)
        tensors = {k: v.float() + 1e-3 * torch.randn(v.shape, generator=draw) for k, v in read(llamas / "a").items()}
        shutil.rmtree(tmp_path / "models" / "a")
        write(tmp_path / "models" / "a", tensors, json.loads((llamas / "a" / "config.json").read_text()))
    model, sources = Model(read(llamas / "base"), torch.float32), Pristine()
    taken, run = [], MultiTensor.run

    def counted(self: MultiTensor, *arguments: Any) -> frozenset[str]:
        taken.append(run(self, *arguments))
        return taken[-1]

    monkeypatch.setattr(MultiTensor, "run", counted)
    wanted = []
    for number, given in enumerate(CANDIDATES):
        recipe = recipe_in(tmp_path / "models", {"a": ("a", weight)}, given, output=output)
        blend(recipe, tmp_path / str(number), device="cpu")
        wanted.append((recipe, read(tmp_path / str(number))))
    for number in random.Random(3).choices(range(len(wanted)), k=5 * len(wanted)):
        recipe, stored = wanted[number]
        assert not blend_into(model, recipe, sources, measured=False).tensors
        found = model.state_dict()
        assert all(same_bytes(found[name], values.float()) for name, values in stored.items()), CANDIDATES[number]
    assert sum(len(names) > 0 for names in taken) > 3 * len(wanted)


SEVERAL: list[dict[str, Any]] = [
    {"method": "ties", "density": 0.3, "where": [{"match": "*mlp*", "lambda": 0.25}]},
    {"method": "linear"},
    {"method": "consensus"},
    {"method": "metagpt"},
    {"method": "norm_budget"},
    {"method": "tsv_m"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rounding"),
    [
        ("bfloat16", "stochastic"),
        pytest.param("bfloat16", "nearest", marks=pytest.mark.slow),
        pytest.param("float16", "nearest", marks=pytest.mark.slow),
        pytest.param("float32", "nearest", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "blends", [SEVERAL[::2], pytest.param(SEVERAL[1::2], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_other_lambdas_of_several_experts_take_one_pass(
    kind: str, rounding: str, blends: Any, llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged delta is kept when it is asked for again, or at once if the whole tensor had to be looked at."""
    dtype = getattr(torch, kind)
    model, sources = Model(read(llamas / "base"), dtype), Pristine()
    taken, run = [], MultiTensor.run

    def counted(self: MultiTensor, *arguments: Any) -> frozenset[str]:
        taken.append(run(self, *arguments))
        return taken[-1]

    monkeypatch.setattr(MultiTensor, "run", counted)
    for number, given in enumerate(blends):
        for lambda_ in (1.0, 0.4, 1.7):
            recipe = recipe_in(llamas, TWO, {**given, "lambda": lambda_}, output={"rounding": rounding, "dtype": kind})
            blend(recipe, tmp_path / f"{number}-{lambda_}", device="cpu")
            blend_into(model, recipe, sources, measured=False)
            stored, found = read(tmp_path / f"{number}-{lambda_}"), model.state_dict()
            assert all(same_bytes(found[name], values) for name, values in stored.items()), (given, lambda_)
        assert taken[-1] == stored.keys(), given


def test_a_rule_s_merged_delta_needs_no_torch(llamas: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources = Model(read(llamas / "base"), torch.float32), Pristine()
    monkeypatch.setattr(Flow, "merged", lambda *_: pytest.fail("went through torch"))
    for given in SEVERAL[2:5]:
        for lambda_ in (1.0, 0.4):
            blend_into(model, recipe_in(llamas, TWO, {**given, "lambda": lambda_}), sources, measured=False)


def test_inexact_places_are_where_adding_misses_the_expert() -> None:
    """The difference is rounded at 20, the expert is -0 at 60; elsewhere the sum is exact, or nothing changed."""
    base, first = torch.linspace(0.5, 1, 100), torch.linspace(0.5, 1, 100) + 2.0**-10
    base[20], first[20] = 1.0, 2.0**-30
    base[60], first[60] = 0.5, -0.0
    base[80], first[80] = 0.0, -0.0
    readers = [
        HostReader({"w": TensorInfo("w", "F32", (100,), "", 0, 400)}, {"w": one.numpy().view(np.uint8)})
        for one in (base, first, base.clone())
    ]
    found = inexact_places(readers[0], "w", [(readers[1], "w"), (readers[2], "w")], 100)
    assert found is not None
    assert found.places.tolist() == [20, 60]
    assert found.values.view(np.float32)[:, 0].tolist() == [2.0**-30, 0.0]
    assert found.values.view(np.float32)[:, 1].tolist() == base[[20, 60]].tolist()
    first[99] = float("inf")
    assert inexact_places(readers[0], "w", [(readers[1], "w")], 100) is None


def test_a_candidate_that_is_not_finite_is_refused(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    shutil.copytree(llamas, tmp_path / "models")
    tensors = read(llamas / "a")
    next(values for values in tensors.values() if values.ndim == 2).view(-1)[5] = float("nan")
    shutil.rmtree(tmp_path / "models" / "a")
    write(tmp_path / "models" / "a", tensors, json.loads((llamas / "a" / "config.json").read_text()))
    model, sources = Model(read(llamas / "base"), torch.float32), Pristine()
    for given in ({"method": "linear"}, {"method": "linear", "lambda": 0}, {"method": "ties", "density": 0.1}):
        with pytest.raises(KtmergeError, match="NaN or infinite"):
            blend_into(model, recipe_in(tmp_path / "models", ONE, given), sources, measured=False)


def test_what_is_no_loaded_model_is_told(llamas: Path, recipe_in: Any) -> None:
    with pytest.raises(UsageError, match="takes a loaded model, not PosixPath; load it, or write"):
        blend_into(llamas / "base", recipe_in(llamas, ONE, {"method": "linear"}))


def test_a_model_whose_memory_changed_is_found_again(llamas: Path, recipe_in: Any) -> None:
    model, sources = Model(read(llamas / "base"), torch.float32), Pristine()
    recipes = [recipe_in(llamas, ONE, {"method": "linear", "lambda": lambda_}) for lambda_ in (0.5, 1.0)]
    blend_into(model, recipes[0], sources, measured=False)
    for values in model.parameters():
        values.data = torch.zeros_like(values)
    blend_into(model, recipes[1], sources, measured=False)
    found = model.state_dict()
    assert all(same_bytes(found[name], values.float()) for name, values in read(llamas / "a").items())
