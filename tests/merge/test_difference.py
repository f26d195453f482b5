"""In what two recipes, locks and blends differ: named key by key, and whether it changes the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktmerge import api
from ktmerge.cli import _exit_code
from ktmerge.errors import UsageError
from ktmerge.merge import blend

RECIPE: dict[str, Any] = {
    "ktmerge": 1,
    "name": "one",
    "base": "base",
    "experts": {"a": {"model": "a"}, "b": {"model": "b", "weight": 0.5}},
    "blend": {"method": "ties", "density": 0.3, "where": [{"part": "norm", "keep": "base"}]},
    "eval": {"suite": "suite.yaml"},
}


def changed(**values: Any) -> dict[str, Any]:
    """The recipe with other values; of a path ``a__b``, deep inside."""
    document = json.loads(json.dumps(RECIPE))
    for path, value in values.items():
        *outer, last = path.split("__")
        target = document
        for key in outer:
            target = target.setdefault(key, {})
        target[last] = value
    return document


def compared(folder: Path, second: dict[str, Any]) -> dict[str, str]:
    """What differs, and whether it changes the weights."""
    for name, document in (("first", RECIPE), ("second", second)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    found = api.diff(str(folder / "first.yaml"), str(folder / "second.yaml"))
    return {one.what: one.changes for one in found.differences}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"blend__scope": "tensor", "blend__lambda": 1.0, "output__rounding": "nearest", "seed": 42}, {}),
        ({"name": "two", "description": "other"}, {"name": "no", "description": "no"}),
        ({"blend__density": 0.4}, {"blend.density": "yes"}),
        ({"blend__lambda": 0.5}, {"blend.lambda": "yes"}),
        ({"blend__method": "trim"}, {"blend.method": "yes"}),
        ({"blend__where": []}, {"blend.where[0]": "yes"}),
        ({"blend__where": [{"class": "vector", "keep": "base"}]}, {"blend.where[0]": "yes"}),
        ({"experts__b__weight": 1.0}, {"experts.b.weight": "yes"}),
        ({"experts__b__model": "c"}, {"experts.b.model": "perhaps"}),
        ({"experts__c": {"model": "c"}}, {"experts.c": "yes"}),
        ({"seed": 1}, {"seed": "perhaps"}),
        ({"seed": 1, "output__rounding": "stochastic"}, {"seed": "yes", "output.rounding": "yes"}),
        ({"output__not_finite": "keep_base"}, {"output.not_finite": "perhaps"}),
        ({"eval__suite": "other.yaml"}, {"eval.suite": "no"}),
    ],
)
def test_keys_that_differ(tmp_path: Path, values: dict[str, Any], expected: dict[str, str]) -> None:
    assert compared(tmp_path, changed(**values)) == expected


def test_what_matters_stands_first(tmp_path: Path) -> None:
    found = list(compared(tmp_path, changed(name="two", seed=3, blend__density=0.5)).values())
    assert found == ["yes", "perhaps", "no"]


@pytest.fixture
def made(llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "made"
    shutil.copytree(llamas, folder)
    shutil.copytree(folder / "a", folder / "copy")
    experts = {"a": ("a", 1.0), "b": ("b", 0.5)}
    for out, given in (
        ("out", experts),
        ("copied", {**experts, "a": ("copy", 1.0)}),
        ("other", {**experts, "a": ("c", 1.0)}),
    ):
        blend(recipe_in(folder, given, {"method": "ties", "density": 0.3}), folder / out, device="cpu")
    return folder


def test_locks_know_the_same_weights_by_other_names(made: Path) -> None:
    same = api.diff(str(made / "out"), str(made / "copied"))
    assert [(one.what, one.changes) for one in same.differences] == [("experts.a.model", "no")]
    assert same.changes == "no"
    other = api.diff(str(made / "out" / "ktmerge.lock.yaml"), str(made / "other"))
    assert {one.what: one.changes for one in other.differences} == {"experts.a.model": "yes", "output": "yes"}


def diffed(first: Path, second: Path) -> dict[str, tuple[str, str]]:
    return {one.what: (one.changes, one.why) for one in api.diff(str(first), str(second)).differences}


def test_what_is_only_written_otherwise_changes_nothing(made: Path, tmp_path: Path) -> None:
    """Another way to the same folder, rules in another order or of no effect, the stages of a method by name."""
    rules = [{"part": "embed", "keep": "base"}, {"part": "norm", "lambda": 0.5}]
    first = changed(blend={"method": "ties", "density": 0.3, "where": rules})
    second = changed(
        base=str(made / "base"), experts__a__model="../made/a", blend=first["blend"] | {"where": rules[::-1]}
    )
    for name, document in (("first", first), ("second", second)):
        (made / f"{name}.yaml").write_text(yaml.safe_dump({**document, "eval": None}))
    found = diffed(made / "first.yaml", made / "second.yaml")
    assert {what: changes for what, (changes, _) in found.items()} == dict.fromkeys(
        ["base", "experts.a.model", "blend.where[0]", "blend.where[1]"], "no"
    )
    assert found["base"][1] == "the same folder"
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "a", "b"):
        shutil.copytree(made / name, tmp_path / "elsewhere" / name)
    shutil.copyfile(made / "first.yaml", tmp_path / "elsewhere" / "first.yaml")
    apart = diffed(made / "first.yaml", tmp_path / "elsewhere" / "first.yaml")
    assert {what: changes for what, (changes, _) in apart.items()} == dict.fromkeys(
        ["base", "experts.a.model", "experts.b.model"], "perhaps"
    )


def test_the_command_prints_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["recipe", "diff", str(made / "out"), str(made / "copied"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes_output"] == "no"
    with pytest.raises(UsageError, match=r"has no ktmerge\.lock\.yaml"):
        api.diff(str(made / "out"), str(made / "a"))
