"""A sweep's way into a loaded model: prepared once, from memory to memory, and still the bytes of the files' way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import read, same_bytes
from torch import nn

from ktmerge.merge import blend, blend_into
from ktmerge.merge.flow import Flow
from ktmerge.merge.merged import MergedDeltas
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.pristine import Pristine
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


class Model(nn.Module):
    """Parameters by the checkpoint's names."""

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        for name, values in tensors.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(values.to(dtype), requires_grad=False))

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {name.replace("/", "."): values for name, values in super().state_dict().items()}


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.bfloat16, "stochastic"),
        pytest.param(torch.bfloat16, "nearest", marks=pytest.mark.slow),
        pytest.param(torch.float32, "stochastic", marks=pytest.mark.slow),
        pytest.param(torch.float32, "nearest", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_candidates_equal_the_files(
    dtype: torch.dtype, rounding: str, llamas: Path, tmp_path: Path, recipe_in: Any
) -> None:
    """Whatever is kept from one candidate to the next: plans, thresholds, merged deltas."""
    model, sources = Model(read(llamas / "base"), dtype), Pristine()
    for number, (experts, given) in enumerate(BLENDS):
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
    for key in ("first", "second"):
        made = held.begin(key, 6)
        assert made is not None
        made.filled = 6
    assert held.get("first") is not None  # used last
    assert held.begin("third", 6) is not None
    assert held.get("second") is None
    assert held.get("first") is not None
    assert held.get("third") is None  # not whole yet
    assert held.begin("too large", 13) is None


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
