"""Random recipes: what the shipped JSON Schema marks in an editor is what the loader refuses, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from ktmerge.errors import UsageError
from ktmerge.merge.schema import FOLDER
from ktmerge.merge.sections import check_recipe
from ktmerge.recipes.adapters import Adapter
from ktmerge.recipes.evaluation import Evaluation
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.harness import HarnessTask
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Expert, Recipe, Statistics
from ktmerge.recipes.suites import GenerateTask, Suite, TextTask

SCHEMA = Draft202012Validator(json.loads((FOLDER / "recipe.schema.json").read_text()))
METHODS = st.sampled_from(
    ["ties", "linear", "task_arithmetic", "dare_ties", "breadcrumbs", "slerp", "no_such", None, 3]
)
VALUES = st.sampled_from([0.3, 1, 0, -1, 2.5, "tensor", "global", "0.5", True, None, [], {}])
PARAMETERS = st.dictionaries(
    st.sampled_from(["density", "scope", "lambda", "tie", "rescale", "outliers", "densty", "t"]), VALUES, max_size=2
)
RULES = st.lists(
    st.tuples(
        st.fixed_dictionaries(
            {}, optional={key: st.sampled_from(["embed", None]) for key in ("part", "match", "class")}
        ),
        st.fixed_dictionaries(
            {}, optional={"keep": st.sampled_from(["base", None]), "method": st.sampled_from(["ties", "no_such", None])}
        ),
        PARAMETERS,
    ).map(lambda three: three[0] | three[1] | three[2]),
    max_size=2,
)
BLENDS = st.tuples(
    PARAMETERS,
    st.fixed_dictionaries({}, optional={"method": METHODS, "where": RULES, "stages": st.sampled_from([None, "x"])}),
).map(lambda two: two[0] | two[1])


@settings(max_examples=30, deadline=None)
@given(blend=BLENDS, weight=st.sampled_from([1, 0.5, "0.5", True, None]))
def test_schema_and_loader_say_the_same(blend: dict[str, Any], weight: Any) -> None:
    document = {"ktmerge": 1, "blend": blend, "experts": {"a": {"model": "m", "weight": weight}, "b": {"model": "n"}}}
    assert SCHEMA.is_valid(document) == loads(document), json.dumps(document)


def loads(document: dict[str, Any]) -> bool:
    try:
        check_recipe(parse_recipe(json.loads(json.dumps(document)), "x", Path()))
    except UsageError:
        return False
    return True


JOB, ADAPTER = {"data": "d"}, {"name": "lora"}
TEXT = {"name": "t", "kind": "text", "data": "d"}
TASK = {**TEXT, "kind": "generate", "prompt": "p", "answer": "a"}
SECTIONS: dict[type[BaseModel], dict[str, Any]] = {
    Recipe: {"ktmerge": 1}, Statistics: {"data": "d"}, Expert: {"model": "m"}, Evaluation: {"suite": "s"},
    FinetuneJob: JOB, Adapter: ADAPTER, Suite: {"ktmerge_suite": 1, "upstream": [TEXT]}, TextTask: TEXT,
    GenerateTask: TASK, HarnessTask: {"name": "t", "kind": "lm_eval", "lm_eval": "t"},
}  # fmt: skip
NUMBERS = [True, False, 1, 8.0, 1e3, 0.5, "1", "0.5", "yes", [1], None]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda one: one.__name__)
def test_a_number_is_no_true_and_no_text(section: type[BaseModel]) -> None:
    file = "suite" if section in (Suite, TextTask, GenerateTask, HarnessTask) else "recipe"
    whole = json.loads((FOLDER / f"{file}.schema.json").read_text())
    own = {**whole["$defs"][section.__name__], "$defs": whole["$defs"]} if section.__name__ in whole["$defs"] else whole
    numeric = [
        field.alias or name
        for name, field in section.model_fields.items()
        if {"int", "float", "bool"} & set(re.findall(r"\w+", str(field.annotation))) and name != "learning_rates"
    ]
    assert numeric
    for key in numeric:
        for value in NUMBERS:
            document = {**SECTIONS[section], key: value}
            assert Draft202012Validator(own).is_valid(document) == is_valid(section, document), (key, value)
            if isinstance(value, str):
                assert not is_valid(section, document), (key, value)


def is_valid(section: type[BaseModel], document: dict[str, Any]) -> bool:
    """Whether every value is of its kind and in its range; what keys say together is not asked."""
    try:
        section.model_validate(document)
    except ValidationError as error:
        return all(problem["type"] == "value_error" for problem in error.errors())
    return True


def test_a_whole_number_may_be_written_as_a_power_of_ten() -> None:
    recipe = parse_recipe({"ktmerge": 1, "seed": 1e3, "eval": {"suite": "s", "bootstrap": 500.0}}, "x", Path())
    assert (recipe.seed, recipe.eval and recipe.eval.bootstrap) == (1000, 500)
    with pytest.raises(UsageError, match=r"seed: .*integer, not true"):
        parse_recipe({"ktmerge": 1, "seed": True}, "x", Path())


def test_one_text_stands_for_a_list_of_one() -> None:
    assert GenerateTask.model_validate({**TASK, "stop": "."}).stop == ["."]
