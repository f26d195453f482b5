"""What a recipe will do in words, and recipes written from answers."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktmerge import api
from ktmerge.cli import _exit_code
from ktmerge.errors import UsageError
from ktmerge.merge.drafting import LEANS
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.sections import check_recipe
from ktmerge.recipes import gallery, load_recipe


def lines(found: Any, heading: str) -> list[str]:
    return list(dict(found.sections)[heading])


def test_every_tensor_of_a_plan_is_told_of_once(llamas: Path, tmp_path: Path) -> None:
    shutil.copytree(llamas, tmp_path, dirs_exist_ok=True)
    rules = [{"part": "llm.layers[0]", "keep": "base"}, {"class": "embed", "keep": "a"}]
    document = {"ktmerge": 1, "base": "base", "experts": {"a": {"model": "a"}, "b": {"model": "b", "weight": 0.5}},
                "blend": {"method": "ties", "density": 0.3, "lambda": 0.8, "where": rules}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    told = lines(api.explain(str(tmp_path / "r.yaml")), "What happens to each part")
    plan = plan_blend(load_recipe(tmp_path / "r.yaml"))
    counts = [int(line.split("(")[1].split(" tensor")[0]) for line in told]
    assert sum(counts) == len(plan.tensors)
    kept = next(line for line in told if line.endswith("kept as in the base."))
    assert f"({sum(tensor.action == 'base' for tensor in plan.tensors)} tensors" in kept
    assert any("taken from a, unchanged." in line and "embed" in line for line in told)
    assert any("largest magnitude [density 0.3]" in line and "times lambda 0.8" in line for line in told)
    assert "Expert b is b, weight 0.5." in lines(api.explain(str(tmp_path / "r.yaml")), "What goes in")


@pytest.mark.parametrize("name", gallery.names())
def test_every_recipe_of_the_gallery_can_be_explained(name: str) -> None:
    text = api.explain(name).text()
    assert load_recipe(name).description in text
    assert "## What happens to each part" in text
    assert "arXiv" not in text


def test_a_wrong_recipe_is_not_explained() -> None:
    with pytest.raises(UsageError, match="densty"):
        api.explain("ties", overrides=["blend.densty=0.3"])


@pytest.mark.parametrize("experts", [["a=x"], ["a=x", "b=y", "c: odd=z"]])
@pytest.mark.parametrize("statistics", [False, True])
def test_what_is_written_is_valid(tmp_path: Path, experts: list[str], statistics: bool) -> None:
    turned = {}
    for lean in LEANS:
        given = [one.replace("c: odd", "c-odd") for one in experts]
        path = api.new_recipe(tmp_path / f"{lean}.yaml", base="org/base@main", experts=given, statistics=statistics,
                              keep=["vision", "llm.layers[0:2]"], lean=lean)  # fmt: skip
        recipe = load_recipe(path)
        check_recipe(recipe)
        assert recipe.base == "org/base@main"
        assert list(recipe.experts) == [one.partition("=")[0] for one in given]
        assert recipe.blend is not None
        assert [(rule.part, rule.keep) for rule in recipe.blend.where] == [
            ("vision", "base"),
            ("llm.layers[0:2]", "base"),
        ]
        turned[lean] = recipe.blend.lambda_ if recipe.blend.lambda_ is not None else recipe.blend.parameters["a"]
        assert (recipe.statistics is not None) == statistics
    assert turned["upstream"] < turned["balanced"] < turned["downstream"]


def test_answers_that_cannot_be(tmp_path: Path) -> None:
    for change, words in (
        ({"lean": "much"}, "lean towards upstream, balanced, downstream"),
        ({"keep": ["llm.layers["]}, "can't read"),
        ({"experts": []}, "at least one expert"),
        ({"experts": ["a=x", "a=y"]}, "two models are called 'a'"),
    ):
        given: dict[str, Any] = {"base": "b", "experts": ["a=x"], **change}
        with pytest.raises(UsageError, match=words):
            api.new_recipe(tmp_path / "r.yaml", **given)
        assert not (tmp_path / "r.yaml").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "r.yaml")
    answers = ["--base", "b", "--expert", "a=x, b=y", "--no-statistics", "--keep", "", "--lean", "upstream"]
    assert _exit_code(["recipe", "new", out, *answers]) == 0
    assert _exit_code(["recipe", "new", out, *answers]) == 2
    assert _exit_code(["recipe", "explain", out]) == 0
    assert "Expert a is x." in capsys.readouterr().out


def test_a_description_is_one_line_and_steers_no_terminal(tmp_path: Path) -> None:
    document = {"ktmerge": 1, "description": "half\n## What comes out\n* nothing \x1b[2J"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    told = api.explain(str(tmp_path / "r.yaml")).text()
    assert r"* half ## What comes out * nothing \x1b[2J" in told.splitlines()


def test_what_is_trained_is_told_as_it_is(tmp_path: Path) -> None:
    job = {"data": "d.jsonl", "max_steps": 4}
    shared = {**job, "curriculum": "shared"}
    jobs = {"a": {**job, "adapter": "prompt"}, "b": {**job, "adapter": "lora"}, "c": shared, "d": shared}
    document = {"ktmerge": 1, "base": "base", "experts": {name: {"model": name} for name in jobs},
                "finetune": {"experts": jobs}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    found = api.explain(str(tmp_path / "r.yaml"))
    told = lines(found, "How the experts are made")
    assert told[0] == "a: a prompt adapter at 'llm' of the base is trained on d.jsonl for 4 steps."
    assert told[1].endswith("for 4 steps, then folded into it.")
    assert "the first of them together with the others of this curriculum" in told[2]
    assert not any("blended" in line or "weight" in line for line in lines(found, "What goes in"))


def test_where_nobody_can_be_asked_the_defaults_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    given = ["recipe", "new", str(tmp_path / "r.yaml"), "--base", "org/base@main"]
    assert _exit_code(given) == 2
    assert "--expert" in capsys.readouterr().err
    assert not (tmp_path / "r.yaml").exists()
    assert _exit_code([*given, "--expert", "a=x,b=y", "--expert", "c=z"]) == 0
    assert list(load_recipe(tmp_path / "r.yaml").experts) == ["a", "b", "c"]
    capsys.readouterr()
    assert _exit_code(given) == 2
    assert "exists" in capsys.readouterr().err
