"""The tables of all methods: complete, and as committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktmerge import api
from ktmerge.errors import UsageError
from ktmerge.merge import catalogue
from ktmerge.merge.registry import methods
from ktmerge.merge.settings import blend_setting
from ktmerge.merge.stage import KINDS, Need, Parameters, Stage
from ktmerge.recipes import gallery, load_recipe
from ktmerge.recipes.schema import Blend

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_has_the_tables_of_today() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert catalogue.fill(text) == text, "run: python -m ktmerge.merge.catalogue docs/methods.md"


def test_every_method_says_what_people_ask() -> None:
    for one in methods().values():
        assert one.summary.endswith("."), one.name
        assert len(one.summary) <= 130, one.name
        assert all((one.source, one.cost, one.formula)), f"{one.name}: source, cost or formula is missing"


def test_every_method_has_a_recipe_in_the_gallery() -> None:
    recipes = [load_recipe(name) for name in gallery.names()]
    shown = {recipe.blend.method for recipe in recipes if recipe.blend is not None}
    assert set(methods()) <= shown, f"no gallery recipe for {sorted(set(methods()) - shown)}"


def test_every_recipe_of_the_gallery_says_when_to_use_it() -> None:
    for name in gallery.names():
        assert load_recipe(name).description.endswith("."), name


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ([], "none"),
        ([Need("inputs", "base")], "inputs of base"),
        (
            [Need("inputs", "experts"), Need("fisher", "base"), Need("inputs", "base")],
            "Fisher of base, inputs of base and experts",
        ),
    ],
)
def test_data_need_comes_from_what_the_stages_ask_for(needs: list[Need], words: str) -> None:
    stage = Stage("s", "combine", Parameters, lambda: None, needs=lambda parameters: needs)  # type: ignore[arg-type]
    setting = blend_setting(Blend(method="linear"))
    use = type(setting.pipelines["matrix"].combine)(stage, Parameters())
    line = type(setting.pipelines["matrix"])("m", (), use)
    assert catalogue.data_of(type(setting)(setting.method, {"matrix": line}, 1.0)) == words


def test_the_stages_of_every_kind_are_shown() -> None:
    table = catalogue.stage_table()
    assert table.count("\n| combine |") >= 3
    assert all(line.split(" | ")[0].strip("| ") in KINDS for line in table.splitlines()[2:])


def test_differences_are_read_from_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply() -> None:
        """Do it.

        Differs from mergekit: all of it is
        kept.
        Differs from the paper's code in one more thing.

        Not this.
        """

    stage = Stage("s", "combine", Parameters, apply)  # type: ignore[arg-type]
    monkeypatch.setattr(catalogue, "stages", lambda: {"s": stage})
    assert list(catalogue.differences()) == [
        ("s", "Differs from mergekit: all of it is kept."),
        ("s", "Differs from the paper's code in one more thing."),
    ]
    assert catalogue.difference_list().startswith("* `s`: differs from mergekit")


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(UsageError, match="<!-- methods -->"):
        catalogue.fill("# Methods\n")


def test_the_list_of_recipes_says_what_each_needs() -> None:
    found = {recipe.name: recipe for recipe in api.list_recipes()}
    assert list(found) == gallery.names()
    assert found["ties"].method == "ties"
    assert found["ties"].data == "none"
    assert {recipe.data != "none" for recipe in found.values()} == {True, False}
