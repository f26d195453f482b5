"""The model card: what the hub reads of it, and that its recipe gives the same bytes again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktmerge.merge import blend
from ktmerge.merge.card import BASE_FILE, FILE
from ktmerge.merge.record import portable
from ktmerge.recipes import load_recipe

TWO = {"a": ("a", 0.7), "b": ("b", 0.5)}
BOMB = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
"""Each takes in nine of the one before."""
TIES = {"method": "ties", "density": 0.4, "where": [{"part": "embed", "keep": "a"}, {"part": "norm", "lambda": 0.5}]}


def front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    document: dict[str, Any] = yaml.safe_load(found[1])
    return document


def block(text: str, language: str) -> str:
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[2]


@pytest.fixture
def models(llamas: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llamas, tmp_path / "models")


def card_of(folder: Path) -> str:
    return (folder / FILE).read_text(encoding="utf-8")


def test_its_recipe_gives_the_same_bytes(models: Path, tmp_path: Path, recipe_in: Any) -> None:
    first = blend(recipe_in(models, TWO, TIES, name="two", seed=9), tmp_path / "out", device="cpu")
    text = card_of(tmp_path / "out")
    (models / "recipe.yaml").write_text(block(text, "yaml"))
    command = block(text, "bash").split()
    assert command[:4] == ["ktmerge", "blend", "--recipe", "recipe.yaml"]
    again = blend(load_recipe(models / command[3]), tmp_path / command[5], device="cpu")
    assert again.out == first.out
    for file in (FILE, "ktmerge.json"):
        assert (tmp_path / command[5] / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_says_what_it_is_made_from_and_how_far_it_moved(models: Path, tmp_path: Path, recipe_in: Any) -> None:
    report = blend(recipe_in(models, TWO, TIES, name="two"), tmp_path / "out", device="cpu")
    text = card_of(tmp_path / "out")
    assert front_matter(text) == {
        "base_model": ["base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["ktmerge", "merge"],
    }
    assert "# two\n" in text
    assert "| a | `a` | 0.7 |" in text
    for row in report.table()[1]:
        assert f"| {' | '.join(row)} |" in text


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base", {"license": "apache-2.0"}),
        ("\ufeff---\nlicense: other\nlicense_name: own\n---\n", {"license": "other", "license_name": "own"}),
        ("# Base\nlicense: mit\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n{{{\n---\n", {}),
        ("---\n- license\n---\n", {}),
        (f"---\nlicense: mit\na0: &a0 {{x: 2024-01-01}}\n{BOMB}---\n", {"license": "mit"}),
        ("---\nlicense: 1\nx: !!nothing 3\n[]: a\nlicense_name: no\n---\n", {}),
    ],
)
def test_the_licence_is_what_the_base_states(
    models: Path, tmp_path: Path, recipe_in: Any, stated: str, expected: dict[str, str]
) -> None:
    (models / "base" / "README.md").write_text(stated, encoding="utf-8")
    blend(recipe_in(models, TWO, TIES), tmp_path / "out", device="cpu")
    matter = front_matter(card_of(tmp_path / "out"))
    assert {key: value for key, value in matter.items() if key.startswith("license")} == expected
    assert (tmp_path / "out" / BASE_FILE).read_text(encoding="utf-8") == stated


def test_no_path_of_this_machine(models: Path, tmp_path: Path, recipe_in: Any) -> None:
    (tmp_path / "recipes").mkdir()
    experts = {"a": (str(models / "a"), 1.0), "b": ("../models/b", 1.0)}
    blend(recipe_in(tmp_path / "recipes", experts, TIES, base=str(models / "base")), tmp_path / "out", device="cpu")
    for file in (FILE, "ktmerge.json", "config.json"):
        text = (tmp_path / "out" / file).read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert ".." not in text
    assert yaml.safe_load(block(card_of(tmp_path / "out"), "yaml"))["experts"]["b"]["model"] == "models/b"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/model@main", "org/model@main"),
        ("runs/spam", "runs/spam"),
        ("./runs/spam", "runs/spam"),
        ("/home/me/models/llama", "llama"),
        ("~/models/llama", "llama"),
        ("../../shared/llama", "shared/llama"),
        ("runs/../../llama", "llama"),
        ("/models/llama+/runs/adapter", "llama+adapter"),
        ("base+runs/adapter", "base+runs/adapter"),
    ],
)
def test_what_is_told_of_a_reference(reference: str, expected: str) -> None:
    assert portable(reference) == expected


def test_models_of_the_hub_are_named_as_the_hub_does(
    models: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"org/base@abc": "base", "other/tuned": "a", "b": "b"}
    monkeypatch.setattr("ktmerge.checkpoints.opening.resolve", lambda reference, _: models / places[reference])
    recipe = recipe_in(models, {"a": ("other/tuned", 1.0), "b": ("b", 1.0)}, TIES, base="org/base@abc")
    blend(recipe, tmp_path / "out", device="cpu")
    text = card_of(tmp_path / "out")
    assert front_matter(text)["base_model"] == ["org/base", "other/tuned"]
    assert "| base | `org/base@abc` |" in text


def test_a_model_of_the_hub_is_told_with_its_commit(models: Path, tmp_path: Path, recipe_in: Any) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--my-org--a--model.x" / "snapshots" / commit
    shutil.copytree(models / "base", snapshot)
    recipe = recipe_in(models, TWO, TIES, base=str(snapshot))
    blend(recipe, tmp_path / "out", device="cpu")
    text = card_of(tmp_path / "out")
    assert front_matter(text)["base_model"] == ["my-org/a--model.x"]
    assert yaml.safe_load(block(text, "yaml"))["base"] == f"my-org/a--model.x@{commit}"


def test_strangers_texts_stay_text(models: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(models, TWO, TIES, description="</p><script>x</script>\n```\n---\n# Not a heading")
    blend(recipe, tmp_path / "out", device="cpu")
    text = card_of(tmp_path / "out")
    assert "\n# Not" not in text
    assert "<script" not in text.partition("## Recipe")[0]
    assert yaml.safe_load(block(text, "yaml"))["description"] == recipe.description
