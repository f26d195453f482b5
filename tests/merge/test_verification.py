"""A blended model is held against its record, its recipe, and a new blend."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from merge_models import read, write
from safetensors.torch import save_file

from ktmerge import api
from ktmerge.checkpoints.workroom import workroom
from ktmerge.cli import _exit_code
from ktmerge.errors import UsageError
from ktmerge.merge import blend, verification
from ktmerge.merge.lock import FILE as LOCK

TWO = {"a": ("a", 1.0), "b": ("b", 0.5)}
WEIGHTS = "model.safetensors"
BESIDE = ["config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def made(llamas: Path, tmp_path: Path, recipe_in: Any) -> Path:
    """A folder with the models and a blend of them, ``out``."""
    folder = tmp_path / "work"
    shutil.copytree(llamas, folder)
    recipe = recipe_in(folder, TWO, {"method": "dare_ties"}, output={"rounding": "stochastic"}, seed=5)
    blend(recipe, folder / "out", device="cpu")
    return folder


def states(found: Any) -> dict[tuple[str, str], str]:
    return {(check.against, check.what): check.state for check in found.checks}


def forget_what_is_beside(out: Path) -> None:
    """Make a record what earlier versions wrote: digests of the weights alone."""
    record = json.loads((out / "ktmerge.json").read_text())
    del record["output"]["beside"]
    (out / "ktmerge.json").write_text(json.dumps(record))


def test_an_output_is_what_its_record_says_and_can_be_made_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = api.verify(made / "out")
    assert alone.holds
    assert states(alone) == {("record", file): "equal" for file in (WEIGHTS, *BESIDE, LOCK)}
    before = sorted(made.iterdir())
    monkeypatch.chdir(made)  # the record's recipe names folders, which start here
    again = api.verify(made / "out", rebuild=True)
    assert again.holds
    assert states(again)[("rebuilt", WEIGHTS)] == "equal"
    assert set(states(again).values()) == {"equal"}
    assert sorted(made.iterdir()) == before


@pytest.mark.slow
def test_models_that_lie_elsewhere_are_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experts = [f"{name}={made / name}" for name in "ab"]
    assert api.verify(made / "out", base=str(made / "base"), experts=experts, rebuild=True).holds
    with pytest.raises(UsageError, match="not made with an expert 'z', but with a, b"):
        api.verify(made / "out", base=str(made / "base"), experts=["z=a"], rebuild=True)
    with pytest.raises(UsageError, match="write name=model"):
        api.verify(made / "out", experts=["a"], rebuild=True)
    with pytest.raises(
        UsageError, match=r"say where the models are, with --recipe or --base FOLDER --expert a=FOLDER\."
    ):
        api.verify(made / "out", experts=[f"b={made / 'b'}"], rebuild=True)


def test_a_changed_weight_is_found(made: Path) -> None:
    tensors = read(made / "out")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, made / "out" / WEIGHTS, metadata={"format": "pt"})
    found = api.verify(made / "out")
    assert not found.holds
    assert {key for key, state in states(found).items() if state != "equal"} == {("record", WEIGHTS)}
    assert "sha256" in found.checks[0].told


@pytest.mark.parametrize("file", ["config.json", LOCK])
def test_what_changed_beside_the_weights_is_found(made: Path, file: str, recipe_in: Any) -> None:
    path = made / "out" / file
    path.write_text(path.read_text().replace("1", "2"))
    assert [(check.what, check.state) for check in api.verify(made / "out").checks if check.state != "equal"] == [
        (file, "differs")
    ]
    path.unlink()
    assert [(check.what, check.state) for check in api.verify(made / "out").checks if check.state != "equal"] == [
        (file, "missing")
    ]
    recipe = recipe_in(made, TWO, {"method": "dare_ties"}, output={"rounding": "stochastic"}, seed=5)
    with pytest.raises(UsageError, match="exists and is not empty"):  # not taken for the finished blend
        blend(recipe, made / "out", device="cpu", resume=True)


@pytest.mark.slow
def test_blends_of_earlier_versions_are_held_to_their_weights(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_what_is_beside(made / "out")
    monkeypatch.chdir(made)
    found = api.verify(made / "out", rebuild=True)
    assert found.holds
    assert {check.what for check in found.checks if check.against == "rebuilt"} == {WEIGHTS}


def test_a_carried_file_whose_name_is_no_text(made: Path, recipe_in: Any) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (made / "base" / name).write_text("carried")
    blend(recipe_in(made, TWO, {"method": "ties"}), made / "odd", device="cpu")
    assert states(api.verify(made / "odd"))[("record", name)] == "equal"


def test_another_input_of_the_same_shape_is_found(made: Path, recipe_in: Any) -> None:
    recipe = recipe_in(made, TWO, {"method": "dare_ties"}, output={"rounding": "stochastic"}, seed=5)
    shutil.rmtree(made / "a")
    shutil.copytree(made / "c", made / "a")
    held = states(api.verify(made / "out", recipe))
    assert [key for key, state in held.items() if state != "equal"] == [("recipe", f"a/{WEIGHTS}")]
    (made / "out" / LOCK).unlink()  # an output of a version that wrote none: only its bytes tell
    forget_what_is_beside(made / "out")
    assert api.verify(made / "out", recipe).holds
    found = api.verify(made / "out", recipe, rebuild=True)
    assert not found.holds
    assert states(found)[("rebuilt", WEIGHTS)] == "differs"


def test_an_input_in_other_files_is_not_called_equal(made: Path, recipe_in: Any) -> None:
    recipe = recipe_in(made, TWO, {"method": "dare_ties"}, output={"rounding": "stochastic"}, seed=5)
    tensors = read(made / "a")
    shutil.rmtree(made / "a")
    write(made / "a", tensors, shards=2)
    held = api.verify(made / "out", recipe)
    assert not held.holds  # whether its numbers are the same, digests of files cannot tell
    assert {key: state for key, state in states(held).items() if state != "equal"} == {("recipe", "input a"): "differs"}
    again = api.verify(made / "out", recipe, rebuild=True)
    assert again.holds
    assert states(again)[("recipe", "input a")] == "may differ"
    next(iter(tensors.values())).view(-1)[0] += 1
    shutil.rmtree(made / "a")
    write(made / "a", tensors, shards=2)
    assert not api.verify(made / "out", recipe, rebuild=True).holds


def test_an_output_where_nobody_may_write(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    rooms: list[Path] = []
    monkeypatch.setattr(verification, "workroom", lambda target: rooms.append(target) or workroom(target))
    monkeypatch.setattr(os, "access", lambda path, mode, access=os.access: mode != os.W_OK and access(path, mode))
    assert api.verify(made / "out", rebuild=True).holds
    assert made not in rooms[0].parents


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("blend_", "seed", "what"),
    [
        ({"method": "dare_ties", "lambda": 0.9}, 5, "what happens to every tensor"),
        ({"method": "dare_ties"}, 6, "seed and random numbers"),
        ({"method": "ties"}, 5, "meaning of the methods"),
    ],
)
def test_another_recipe_is_found(made: Path, recipe_in: Any, blend_: dict[str, Any], seed: int, what: str) -> None:
    recipe = recipe_in(made, TWO, blend_, output={"rounding": "stochastic"}, seed=seed)
    found = api.verify(made / "out", recipe)
    assert not found.holds
    assert states(found)[("recipe", what)] == "differs"


def test_another_version_may_differ(made: Path, recipe_in: Any) -> None:
    record = json.loads((made / "out" / "ktmerge.json").read_text())
    record["versions"]["torch"] = "1.0"
    (made / "out" / "ktmerge.json").write_text(json.dumps(record))
    recipe = recipe_in(made, TWO, {"method": "dare_ties"}, output={"rounding": "stochastic"}, seed=5)
    found = api.verify(made / "out", recipe)
    assert found.holds
    assert states(found)[("recipe", "versions")] == "may differ"


def test_missing_and_further_files_are_found(made: Path) -> None:
    record = json.loads((made / "out" / "ktmerge.json").read_text())
    record["output"]["sha256"] = {"model-00001-of-00001.safetensors": "0" * 64}
    (made / "out" / "ktmerge.json").write_text(json.dumps(record))
    found = states(api.verify(made / "out"))
    assert found[("record", "model-00001-of-00001.safetensors")] == "missing"
    assert found[("record", WEIGHTS)] == "extra"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"kind": "finetune"}'])
def test_folders_without_a_record_are_refused(made: Path, text: str | None) -> None:
    path = made / "out" / "ktmerge.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=r"ktmerge\.json|'ktmerge blend' wrote"):
        api.verify(made / "out")


def test_the_command_says_so_by_its_exit_code(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["recipe", "verify", str(made / "out")]) == 0
    assert "is what its record says" in capsys.readouterr().out
    (made / "out" / WEIGHTS).unlink()
    assert _exit_code(["recipe", "verify", str(made / "out"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["holds"] is False


@pytest.mark.every(5)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda record: record.update(output="gone"), "is damaged"),
        (lambda record: record["output"]["sha256"].update(x=3), "is damaged"),
        (lambda record: record["output"]["sha256"].update({"../base/config.json": "0" * 64}), "is damaged"),
        (lambda record: record["output"]["beside"].update({"/etc/passwd": "0" * 64}), "is damaged"),
        (lambda record: record.update(inputs=7), "is damaged"),
        (lambda record: record.pop("versions"), "is damaged"),
        (lambda record: record["recipe"].update(experts=["a"]), "is damaged"),
        (lambda record: record["recipe"]["experts"].update(a=None), "is damaged"),
        (lambda record: record.update(ktmerge=2), "a version this ktmerge does not know"),
        (lambda record: record.update(kind="run"), "has no record of a blend"),
        (lambda record: record["output"]["sha256"].update({"x" * 300: "0"}), "cannot be looked up: File name too long"),
    ],
)
def test_a_damaged_record_is_named(made: Path, change: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((made / "out" / "ktmerge.json").read_text())
    change(record)
    (made / "out" / "ktmerge.json").write_text(json.dumps(record))
    monkeypatch.chdir(made)
    for arguments in ({}, {"rebuild": True}):
        with pytest.raises(UsageError, match=expected):
            api.verify(made / "out", **arguments)
