"""Random recipes: what the shipped JSON Schema marks in an editor is what the loader refuses, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ktmerge.errors import UsageError
from ktmerge.merge.planning import check_recipe
from ktmerge.merge.schema import FOLDER
from ktmerge.recipes.load import parse_recipe

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


@settings(max_examples=60, deadline=None)
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
