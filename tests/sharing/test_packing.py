"""What a bundle holds, and that whoever gets it makes the same bytes from the same models, and from no others."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundle_models import RECIPE

from ktmerge import api
from ktmerge.checkpoints.staging import Staging
from ktmerge.errors import UsageError
from ktmerge.recipes import gallery, load_recipe
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.overrides import apply_overrides
from ktmerge.sharing.command import blend_command
from ktmerge.sharing.contents import MANIFEST
from ktmerge.sharing.manifest import FileEntry, Input


def names_in(bundle: str) -> list[str]:
    with zipfile.ZipFile(bundle) as archive:
        return archive.namelist()


def test_a_bundle_has_no_weights_and_no_path_of_this_machine(place: Path) -> None:
    api.pack("recipe.yaml", "again.ktr")
    assert names_in("again.ktr") == [MANIFEST, "README.md", "recipe.lock.yaml", "recipe.yaml", "suites/suite.yaml"]
    with zipfile.ZipFile("again.ktr") as archive:
        for name in archive.namelist():
            assert str(place).encode() not in archive.read(name), name
            assert b"model: spam" not in archive.read(name), name
    assert Path("again.ktr").read_bytes() == Path("r.ktr").read_bytes()


def test_the_receiver_makes_the_same_bytes(place: Path, ktmerge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    api.blend("recipe.yaml", "blended")
    api.unpack("r.ktr", "theirs")
    for name, model in (("their-base", "base"), ("their-spam", "spam")):
        shutil.move(model, name)
    given = ["-r", "theirs/recipe.yaml", "--lock", "theirs/recipe.lock.yaml", "--base", "their-base"]
    assert ktmerge("blend", *given, "--expert", "spam=their-spam:0.5", "--out", "made") == 0
    assert Path("made/model.safetensors").read_bytes() == Path("blended/model.safetensors").read_bytes()
    capsys.readouterr()
    for wrong, words in (("spam=their-base:0.5", "not what was locked"), ("spam=their-spam", "every tensor")):
        assert ktmerge("blend", *given, "--expert", wrong, "--out", "other") == 2
        assert words in capsys.readouterr().err
    assert ktmerge("blend", *given[:4], "--out", "other") == 2
    assert "base.sha256-" in capsys.readouterr().err


def test_the_command_that_is_told_works(place: Path, ktmerge: Any) -> None:
    done = api.unpack("r.ktr", "theirs")
    words = done.commands["blend"].replace("BASE", "base").replace("SPAM", "spam").split()
    assert ktmerge(*words[1:]) == 0
    assert Path("blended/model.safetensors").is_file()


def test_the_command_names_every_expert(place: Path) -> None:
    document = yaml.safe_load(Path("recipe.yaml").read_text())
    document["experts"] = {name: {"model": "m", "statistics": "s"} for name in ("spam", "qwen2.5")}
    files = {"config.json": FileEntry.of(b"{}")}
    inputs = {name: Input(model=f"./{name}.sha256-0", files=files) for name in ("base", *document["experts"])}
    words = shlex.split(blend_command(inputs, parse_recipe(document, "r", place), "a b"))
    assert words[3] == "a b/recipe.yaml"
    apply_overrides(document, [word for word, before in zip(words[1:], words, strict=False) if before == "--set"])
    for name, one in document["experts"].items():  # what is set is looked for beside the recipe
        assert one == {"model": f"/PATH/{name.upper()}", "statistics": f"/PATH/{name.upper()}_STATISTICS"}


def test_names_that_differ_by_case_are_told_apart_in_the_command(place: Path) -> None:
    document = yaml.safe_load(Path("recipe.yaml").read_text())
    document |= {"experts": {name: {"model": "m"} for name in ("a", "A", "Base")}, "statistics": "s"}
    files = {"config.json": FileEntry.of(b"{}")}
    inputs = {name: Input(model=f"./{name}.sha256-0", files=files) for name in ("base", *document["experts"])}
    words = shlex.split(blend_command(inputs, parse_recipe(document, "r", place), ""))
    given = [word for word, before in zip(words[1:], words, strict=False) if before in ("--base", "--expert", "--set")]
    assert given == ["BASE", "a=A:1.0", "A=A_2:1.0", "Base=BASE_3:1.0", "statistics=/PATH/BASE_STATISTICS"]


def test_what_stands_above_a_recipe_is_handed_over_with_it(place: Path) -> None:
    """As a sweep says there how it chose; a comment further down has no place in what is written anew."""
    head = "# chosen: trial 7\n# of 60\n"
    Path("recipe.yaml").write_text(head + "ktmerge: 1\n# below\n" + RECIPE.partition("ktmerge: 1\n")[2])
    api.pack("recipe.yaml", "told.ktr")
    text = api.unpack("told.ktr", "theirs").out.joinpath("recipe.yaml").read_text()
    assert text.startswith(head + "ktmerge: 1\n")
    assert "# below" not in text
    assert head in Path("theirs/README.md").read_text()


def test_models_of_the_hub_are_named_by_commit(place: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = Path("models--org--base/snapshots") / commit
    shutil.copytree("base", cached)
    offer = api.pack("recipe.yaml", "hub.ktr", base=str(cached), experts=["spam=spam:0.5"])
    assert offer.manifest is not None
    assert offer.manifest.inputs["base"].model == f"org/base@{commit}"
    assert "A blend of it downloads org/base@" in offer.downloads()
    done = api.unpack("hub.ktr", "theirs")
    recipe = load_recipe("theirs/recipe.yaml")
    assert recipe.base == f"org/base@{commit}"
    assert recipe.experts["spam"].weight == 0.5
    assert "--base" not in done.commands["blend"]


@pytest.mark.slow
def test_what_was_blended_is_put_in(place: Path) -> None:
    api.blend("recipe.yaml", "blended")
    api.pack("recipe.yaml", "with.ktr", blended="blended", with_deltas=True)
    api.pack("recipe.yaml", "made.ktr", with_deltas=True)
    assert names_in("with.ktr") == names_in("made.ktr")
    with zipfile.ZipFile("with.ktr") as one, zipfile.ZipFile("made.ktr") as other:
        for name in ("recipe.yaml", "recipe.lock.yaml", "README.md", "MODEL_CARD.md"):
            assert one.read(name) == other.read(name), name
    done = api.unpack("with.ktr", "theirs")
    assert "ktmerge delta apply" in done.commands["or apply"]
    api.apply_delta("base", "theirs/delta", "applied")
    assert Path("applied/model.safetensors").read_bytes() == Path("blended/model.safetensors").read_bytes()
    locked = yaml.safe_load(Path("theirs/recipe.lock.yaml").read_text())
    assert set(locked["output"]["sha256"]) == {"model.safetensors"}
    with pytest.raises(UsageError, match="not what was locked"):
        api.pack("recipe.yaml", "x.ktr", overrides=["blend.lambda=0.1"], blended="blended")
    Path("blended/model.safetensors").write_bytes(Path("base/model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="is not what its lock says"):
        api.pack("recipe.yaml", "x.ktr", blended="blended")
    assert not Path("x.ktr").exists()


def test_places_are_named_as_others_understand_them(place: Path) -> None:
    document = yaml.safe_load(Path("recipe.yaml").read_text())
    document["finetune"] = {"experts": {"spam": {"data": str(place / "secret" / "mails.jsonl")}}}
    suite = Path("suite.yaml").read_text().replace("data/general.jsonl", str(place / "secret" / "general.jsonl"))
    Path("suite.yaml").write_text(suite)
    Path("recipe.yaml").write_text(yaml.safe_dump(document))
    api.pack("recipe.yaml", "p.ktr")
    api.unpack("p.ktr", "theirs")
    for file in Path("theirs").rglob("*.*"):
        assert "secret" not in file.read_text(), file
    assert "finetune" not in yaml.safe_load(Path("theirs/recipe.yaml").read_text())
    assert "mails.jsonl" in Path("theirs/README.md").read_text()
    assert yaml.safe_load(Path("theirs/suites/suite.yaml").read_text())["upstream"][0]["data"] == "general.jsonl"


def test_a_suite_that_needs_no_change_is_kept_to_the_letter(place: Path) -> None:
    api.unpack("r.ktr", "theirs")
    assert Path("theirs/suites/suite.yaml").read_text() == Path("suite.yaml").read_text()
    assert load_recipe("theirs/recipe.yaml").eval.suite == "suites/suite.yaml"  # type: ignore[union-attr]


def test_scores_are_put_in(place: Path) -> None:
    import numpy as np

    from ktmerge.eval.results import Results
    from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore

    task = TaskInfo("sums", "downstream", "choice", "acc", "d", "e", rows=[0, 1], prompts=["a", "b"], references=[0, 1])
    score = TaskScore(np.array([1.0, 0.0]), {"logprobs": [[-1.0, -2.0], [-1.0, -2.0]]})
    model = ModelInfo(str(place / "base"), "d", "t", "cpu", "float32", 1.0)
    Results("s", "d", [task], {"base": model}, {"base": {"sums": score}}).save(Path("scores.json"))
    offer = api.pack("recipe.yaml", "s.ktr", scores=["scores.json"])
    assert offer.manifest is not None
    assert "scores/scores.json" in offer.manifest.files
    api.unpack("s.ktr", "theirs")
    held = Results.load(Path("theirs/scores/scores.json"))
    assert held.models["base"].path == "base"
    assert held.scores["base"]["sums"].scores.tolist() == [1.0, 0.0]
    with pytest.raises(UsageError, match="score file"):
        api.pack("recipe.yaml", "t.ktr", scores=["base/config.json"])


@pytest.mark.slow
@pytest.mark.parametrize("name", gallery.names())
def test_every_recipe_survives_being_handed_over(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, base="b", experts=["one=x", "two=y:0.3"])
    document = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"folder"})
    text = yaml.safe_dump(document, sort_keys=False)
    again = parse_recipe(yaml.safe_load(text), name, recipe.folder)
    assert again == recipe


def test_outputs_are_not_replaced_silently(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path("r.ktr").read_bytes()
    with pytest.raises(UsageError, match=r"r\.ktr exists"):
        api.pack("recipe.yaml", "r.ktr")
    with pytest.raises(UsageError, match=r"is called NAME\.ktr"):
        api.pack("recipe.yaml", "r.zip")
    with pytest.raises(UsageError, match="no such folder"):
        api.pack("recipe.yaml", "n.ktr", base="nowhere")
    api.unpack("r.ktr", "theirs")
    Path("theirs/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        api.unpack("r.ktr", "theirs")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files but no checkpoint"):
        api.unpack("r.ktr", "other", overwrite=True)
    api.unpack("r.ktr", "theirs", overwrite=True)
    assert not Path("theirs/mine.txt").exists()

    def interrupted(self: Staging) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.unpack("r.ktr", "third")
    assert not Path("third").exists()
    assert Path("r.ktr").read_bytes() == before
    assert [name for name in os.listdir() if name.startswith(".")] == []


@pytest.mark.slow
def test_to_and_from_a_folder(place: Path, ktmerge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ktmerge("recipe", "push", "r.ktr", "./shelf") == 0
    assert ktmerge("recipe", "push", "r.ktr", "./shelf") == 2
    assert ktmerge("recipe", "push", "recipe.yaml", "./shelf", "--overwrite") == 0
    assert ktmerge("recipe", "pull", "./shelf", "--out", "one", "--json", "--yes") == 0
    told = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))
    assert told["out"] == "one"
    assert ktmerge("recipe", "pull", "r.ktr", "-o", "two", "-y") == 0
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))
    for arguments, words in (
        (("pull", "./nowhere"), "no such file or folder"),
        (("pull",), "give either a place"),
        (("push", "r.ktr"), "give either a target"),
        (("push", "r.ktr", "somewhere"), "no such file or folder"),
        (("push", "r.ktr", "./x", "--with-deltas"), "is packed already"),
        (("push", "nothing.ktr", "./x"), "no such bundle"),
        (("pull", "http://example.org/r.ktr"), "only https is taken"),
        (("pull", "ftp://example.org/r.ktr"), "only https is taken"),
        (("pull", "file:///etc/passwd"), "only https is taken"),
    ):
        capsys.readouterr()
        assert ktmerge("recipe", *arguments) == 2
        assert words in capsys.readouterr().err


def test_a_clone_of_a_repository_is_taken(place: Path) -> None:
    """With what git has beside the files; but not with what stands for them."""
    api.pack("recipe.yaml", "d.ktr", with_deltas=True)
    api.unpack("d.ktr", "clone")
    Path("clone/.git").mkdir()
    for name in (".git/config", ".gitattributes"):
        Path("clone", name).touch()
    out = api.unpack("clone", "out").out
    assert not list(out.glob(".*"))
    Path("clone/delta/delta.bin").write_bytes(bytes(134))
    with pytest.raises(UsageError, match=r"other files than there are: delta/delta.bin 134 B \(a pointer of Git LFS"):
        api.look("clone")


@pytest.mark.slow
def test_an_adapter_is_handed_over_whatever_its_folder_is_called(place: Path, ktmerge: Any) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    numbers = np.random.default_rng(5).standard_normal((2, 8)).astype(np.float32)
    tensors = {f"{layer}.lora_A.weight": numbers, f"{layer}.lora_B.weight": np.ascontiguousarray(numbers.T)}
    save_file(tensors, "adapter/adapter_model.safetensors")
    for model, count in (("adapter", 1), ("spam+adapter", 2)):
        offer = api.pack("recipe.yaml", "a.ktr", experts=[f"spam={model}:0.5"], overwrite=True)
        assert offer.manifest is not None
        assert offer.manifest.inputs["spam"].model.count("./spam.") == count
        api.unpack("a.ktr", f"theirs-{count}")
        for name in ("spam", "adapter", "base"):
            shutil.copytree(name, f"elsewhere/my-{name}", dirs_exist_ok=True)
        given = ["--base", "elsewhere/my-base", "--out", f"made-{count}", "--lock", f"theirs-{count}/recipe.lock.yaml"]
        mine = "+".join(f"elsewhere/my-{part}" for part in model.split("+"))
        assert ktmerge("blend", "-r", f"theirs-{count}/recipe.yaml", *given, "--expert", f"spam={mine}:0.5") == 0
