"""What a sweep turns."""

from __future__ import annotations

import numpy as np
import pytest

from ktmerge.errors import UsageError
from ktmerge.recipes.load import load_recipe
from ktmerge.sweep.space import METHOD, Range, Space, told


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("blend.lambda", "write key=low:high"),
        ("blend.lambda=0", "two numbers"),
        ("blend.lambda=1:0", "must be below"),
        ("blend.lambda=0:nan", "must be below"),
        ("blend.lambda=0:1:lgo", "Did you mean 'log'"),
        ("blend.lambda=0:1:log", "begin above 0"),
        ("blend.rank=0.5:8:int", "must be whole"),
        ("blend[.lambda=0:1", "write key=low:high"),
        ("blend.scope=[1]|tensor", "choices are numbers, words"),
        ("blend.scope=2001-01-01|tensor", "is a date to YAML"),
    ],
)
def test_a_range_written_wrongly_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint.replace("(", "\\(")):
        Range.parse(text)


def test_ranges_have_kinds_and_steps() -> None:
    assert Range.parse("where[0].lambda=0:1").key == "blend.where[0].lambda"
    assert Range.parse("blend.density=0.01:1:log").evenly(3) == pytest.approx([0.01, 0.1, 1.0])
    assert Range.parse("blend.rank=1:4:int").evenly(9) == [1, 2, 3, 4]
    assert Range.parse("blend.scope=tensor|global").ends() == ("tensor", "global")
    assert Range.parse("experts.e.weight=0:1").key == "experts.e.weight"
    assert Range.parse('experts."e".weight=0:1').key == "experts.e.weight"
    assert Range.parse("blend.scope=tensor|global|tensor").choices == ("tensor", "global")


def test_no_value_lies_beyond_the_ends() -> None:
    for low, high in np.sort(np.random.default_rng(0).random((500, 2))).tolist():
        for log in (False, True):
            values = Range("k", low, high, log=log).evenly(4)
            assert low <= min(values) < max(values) <= high


def test_a_point_makes_a_recipe_and_leaves_out_what_its_method_does_not_know(world) -> None:  # type: ignore[no-untyped-def]
    ranges = [Range.parse("blend.lambda=0:1.2"), Range.parse("blend.density=0.05:1")]
    space = Space(load_recipe(world.recipe), ranges, ["ties", "linear"])
    point = {METHOD: "ties", "blend.lambda": 1e-05, "blend.density": 0.25}
    ties = space.recipe_at(point).blend
    assert ties is not None
    assert (ties.method, ties.lambda_, ties.parameters) == ("ties", 1e-05, {"density": 0.25})
    linear = space.recipe_at({**point, METHOD: "linear"}).blend
    assert linear is not None
    assert (linear.method, linear.parameters) == ("linear", {})
    assert space.used({**point, METHOD: "linear"}) == {METHOD: "linear", "blend.lambda": 1e-05}
    assert space.used(point) == point
    alone = Space(load_recipe(world.recipe), ranges, ["ties"])  # one method: no choice of it is drawn, and it is meant
    assert alone.recipe_at({"blend.lambda": 1e-05, "blend.density": 0.25}).blend == ties
    assert METHOD not in alone.grid(4)[0]
    grid = space.grid(12)
    recipes = {space.recipe_at(one).model_dump_json() for one in grid}
    assert len(recipes) == len(grid) == 12  # 9 of ties, 3 of linear, whose density is idle
    with pytest.raises(UsageError, match="--trials 5: the coarsest grid of these ranges has 6 recipes"):
        space.grid(5)
    assert told(point) == "method ties, lambda 1e-05, density 0.25"


@pytest.mark.parametrize(
    ("ranges", "methods", "complaint"),
    [
        ([], [], "nothing to sweep"),
        (["blend.densty=0:1"], ["ties"], "Did you mean 'density'"),
        (["blend.density=0.5:1.5"], ["ties"], "density"),
        (["blend.lambda=0:1"], ["tise"], "Did you mean 'ties'"),
        (["blend.method=ties|linear"], [], "use --method"),
        (["where[0].lambda=0:1"], [], "where"),
        (["blend.lambda=0:1", "lambda=0:2"], [], "one range"),
        (["experts.e.model=expert|other"], [], "only weights are turned"),
        (["experts.f.weight=0:1"], [], "there is no expert 'f'. Valid: e."),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_work(world, ranges, methods, complaint) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        Space(load_recipe(world.recipe), [Range.parse(one) for one in ranges], methods)
    assert complaint in str(caught.value)


def test_an_expert_with_a_dot_in_its_name_is_turned(world) -> None:  # type: ignore[no-untyped-def]
    recipe = load_recipe(world.recipe, experts=[f"e.1={world.expert}", f"e={world.expert}"])
    knob = Range.parse('experts."e.1".weight=0:1')
    made = Space(recipe, [knob]).recipe_at({knob.key: 0.25})
    assert {name: one.weight for name, one in made.experts.items()} == {"e": 1.0, "e.1": 0.25}
    with pytest.raises(UsageError, match=r'in quotes: .experts\."e\.1"\.weight.'):
        Space(load_recipe(world.recipe, experts=[f"e.1={world.expert}"]), [Range.parse("experts.e.1.weight=0:1")])
