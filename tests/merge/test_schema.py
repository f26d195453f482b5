"""The JSON Schemas that are shipped: as today's recipes and methods are, taking what the loader takes and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from ktmerge.errors import UsageError
from ktmerge.merge.registry import methods
from ktmerge.merge.schema import FOLDER, SCHEMAS, recipe_schema, text
from ktmerge.merge.sections import check_recipe
from ktmerge.recipes import gallery
from ktmerge.recipes.load import parse_recipe

SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema())


@pytest.mark.slow
def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_shipped_is_of_today(name: str) -> None:
    assert (FOLDER / f"{name}.schema.json").read_text() == text(SCHEMAS[name]()), "run 'make tables'"


@pytest.mark.parametrize(
    "names", [gallery.names()[::9], pytest.param(gallery.names(), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_recipe_of_the_gallery_is_valid(validator: Draft202012Validator, names: list[str]) -> None:
    for name in names:
        path, _ = gallery.locate(name)
        found = [error.message for error in validator.iter_errors(yaml.load(path.read_text(), SafeLoader))]
        assert not found, f"{name}: {found}"


BLENDS: list[dict[str, Any]] = [
    {"method": "ties", "density": 0.3},
    {"method": "mergekit:ties", "density": 0.3},
    {"method": "ties", "where": [{"part": "vision", "keep": "base"}, {"class": "embed", "density": 0.5}]},
    {"stages": {"transform": [{"trim": {"density": 0.3}}, "dare"], "combine": {"elect": {"tie": "majority"}}}},
    {"method": "ties", "densty": 0.3},
    {"method": "ties", "density": 1.5},
    {"method": "linear", "density": 0.3},
    {"method": "tiez"},
    {"stages": {"transform": [{"trim": {"densty": 0.3}}]}},
    {"stages": {"combine": "trim"}},
    {"method": "ties", "lambda": "much"},
    {"method": "ties", "where": [{"part": "vision", "method": "linear", "density": 0.5}]},
]


@pytest.mark.parametrize("blend", BLENDS, ids=json.dumps)
def test_schema_and_loader_agree(validator: Draft202012Validator, blend: dict[str, Any]) -> None:
    document = {"ktmerge": 1, "blend": blend}
    assert validator.is_valid(document) == loads(document)


def loads(document: dict[str, Any]) -> bool:
    try:
        check_recipe(parse_recipe(document, "x", Path()))
    except UsageError:
        return False
    return True


def test_every_method_completes_with_its_own_parameters(validator: Draft202012Validator) -> None:
    definitions = recipe_schema()["$defs"]
    for name, method in methods().items():
        own = definitions[f"parameters of {name}"]["properties"]
        for stage in (method.stages.combine, *method.stages.transform, *method.stages.guard):
            assert set(stage[1]) <= set(own), name
