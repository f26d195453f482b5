"""Every option of every registered stage: what is no value of it is refused by name, what is one gives a blend."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from jsonschema import Draft202012Validator
from merge_memory import Workbench
from merge_models import Tensors, same_bytes

from ktmerge.errors import UsageError
from ktmerge.merge.registry import methods, stages
from ktmerge.merge.schema import FOLDER
from ktmerge.merge.sections import check_recipe
from ktmerge.merge.settings import blend_setting
from ktmerge.merge.stage import Method, Stage
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Blend

STAGES = list(stages().values())
OPTIONS = [(stage, name) for stage in STAGES for name in stage.parameters.model_fields]
METHODS = list(methods().values())
ODD: list[Any] = [
    math.nan, math.inf, -math.inf, True, None, "0.5", "", "no such choice", [], [True], ["a"], [math.nan], {},
    {"a": True}, {"a": "b"}, -1, -1e-12, 1.5, 0.3, 1e39, 1e308, -1e308, 10**400,
]  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "h.0.attn.c_attn.weight": (6, 18),
    "h.0.attn.c_attn.bias": (18,),
    "h.0.mlp.experts.gate_up_proj": (2, 8, 6),
    "h.0.one.weight": (1, 1),
    "h.0.row.weight": (1, 9),
    "h.0.ties.weight": (7, 11),
    "h.0.scalar": (),
    "h.0.empty.weight": (0, 4),
    "wte.weight": (9, 6),
    "conv.weight": (2, 3, 2, 2),
}


SCHEMA = json.loads((FOLDER / "recipe.schema.json").read_text())["$defs"]["Blend"]["properties"]["stages"]["properties"]


@cache
def valid_for(schema: str) -> list[bool]:
    """Which of the odd values a JSON Schema takes."""
    validator = Draft202012Validator(json.loads(schema))
    return [validator.is_valid(value) for value in ODD]


@pytest.mark.every(4)
@pytest.mark.parametrize(("stage", "option"), OPTIONS, ids=[f"{stage.name}-{name}" for stage, name in OPTIONS])
def test_odd_values_are_refused_by_name_and_the_schema_agrees(stage: Stage, option: str) -> None:
    published = next(
        one["properties"] for one in SCHEMA[stage.kind]["anyOf"] if stage.name in one.get("properties", {})
    )
    own = published[stage.name]["properties"][option]
    taken = 0
    for value, is_valid in zip(ODD, valid_for(json.dumps({**own, "description": ""})), strict=True):
        blend = {"stages": {"combine": "mean", stage.kind: {stage.name: {option: value}}}}
        try:
            check_recipe(parse_recipe({"ktmerge": 1, "blend": blend}, "recipe", Path()))
            taken += 1
        except UsageError as error:
            message = str(error)
            assert f".{option}: must be " in message, message
            assert len(message) < 350
            assert not is_valid or "nan" in message or "inf" in message, value  # YAML has them, JSON not
        else:
            assert is_valid, value
    assert taken < len(ODD) / 2


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


@pytest.mark.every(9)
@pytest.mark.parametrize("end", ["least", "most"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_ends_of_every_range_give_a_blend(bench: Workbench, method: Method, end: str) -> None:
    base, experts = models(method.experts[1] or 2)
    options = {}
    for pipeline in blend_setting(Blend(method=method.name)).pipelines.values():
        for use in pipeline.uses:
            for name, field in type(use.parameters).model_fields.items():
                options[name] = extreme(field.annotation, field.metadata, end, field.default)
    stored = bench.blend(
        base, experts, {"method": method.name, "lambda": 1.0, **options}, config={"model_type": "gpt2"}
    )
    for name, values in stored.items():
        assert values.isfinite().all(), name
    assert same_bytes(stored["h.0.row.weight"], base["h.0.row.weight"])


@pytest.mark.every(13)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_spelled_out_takes_tensors_of_every_class(bench: Workbench, stage: Stage) -> None:
    base, experts = models(2)
    stored = bench.blend(base, experts, {"stages": {"combine": "mean", stage.kind: stage.name}})
    assert all(values.isfinite().all() for values in stored.values())


def models(count: int) -> tuple[Tensors, dict[str, Tensors]]:
    """Odd shapes, massive ties, a tensor that nobody changed and one that only the first expert did."""
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    experts: dict[str, Tensors] = {}
    for expert in "abc"[:count]:
        experts[expert] = {
            name: values + 2.0**-4 * torch.randint(-1, 2, values.shape, generator=generator)
            for name, values in base.items()
        }
        experts[expert]["h.0.row.weight"] = base["h.0.row.weight"]
        if expert != "a":
            experts[expert]["h.0.attn.c_attn.weight"] = base["h.0.attn.c_attn.weight"]
    return base, experts


def extreme(annotation: Any, marks: list[Any], end: str, default: Any) -> Any:
    """The least or the most that an option takes; of choices the first or the last; of lists and maps the default."""
    choices = get_args(annotation)
    if annotation is bool:
        return end == "most"
    if annotation in (int, float) and end == "least":
        above = [math.nextafter(mark.gt, math.inf) for mark in marks if hasattr(mark, "gt")]
        return next(iter([mark.ge for mark in marks if hasattr(mark, "ge")] + above))
    if annotation in (int, float):
        below = [math.nextafter(mark.lt, -math.inf) for mark in marks if hasattr(mark, "lt")]
        return next(iter([mark.le for mark in marks if hasattr(mark, "le")] + below), 10**30)
    if choices and all(isinstance(choice, str) for choice in choices):
        return choices[0 if end == "least" else -1]
    if type(None) in choices and get_origin(choices[0]) is None and choices[0] in (int, float):
        return extreme(choices[0], marks, end, default)
    if get_origin(annotation) in (list, dict):
        return default
    if choices and get_origin(choices[0]) is Annotated and end == "most":
        kind, field = get_args(choices[0])
        return extreme(kind, field.metadata, end, default)
    words = [get_args(one)[-1] for one in choices if get_origin(one) is Literal]
    return words[0] if words and end == "most" else default
