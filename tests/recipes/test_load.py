"""Recipes are read strictly: what is wrong is named, with the nearest valid name."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.recipes import load_recipe, load_suite
from ktmerge.recipes.load import parse_recipe, suite_of
from ktmerge.recipes.overrides import apply_overrides, key_of, steps_of

RECIPE = """
ktmerge: 1
name: two
base: base
experts:
  spam: {model: runs/spam, weight: 0.5}
  kjv: {model: runs/kjv}
blend:
  method: ties
  density: 0.2
  lambda: 1.0
  where:
    - {part: connector, keep: base}
    - {part: "llm.layers[0:8]", lambda: 0.5}
    - {match: "*.norm.weight", method: linear}
output: {dtype: bfloat16, rounding: nearest}
seed: 42
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(write(folder, text), **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_name_that_no_file_can_have() -> None:
    for load in (load_recipe, load_suite):
        for name, words in (("x" * 300, "cannot be looked up"), ("../gallery/ties", "no such"), ("a\0b", "neither")):
            with pytest.raises(UsageError, match=words):
                load(name)


def test_reads_everything(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE))
    assert recipe.experts["spam"].weight == 0.5
    assert recipe.experts["kjv"].weight == 1.0
    assert recipe.blend is not None
    assert recipe.blend.parameters == {"density": 0.2}
    assert [rule.keep for rule in recipe.blend.where] == ["base", None, None]
    assert recipe.blend.where[1].lambda_ == 0.5
    assert recipe.folder == tmp_path


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("experts:", "expert:", "unknown key 'expert'. Did you mean 'experts'?"),
        ("weight: 0.5", "wieght: 0.5", "unknown key 'experts.spam.wieght'. Did you mean 'weight'?"),
        ("rounding: nearest", "rounding: up", "output.rounding: input should be 'nearest' or 'stochastic', not 'up'"),
        ("lambda: 0.5}", "lambda: half}", "blend.where[1].lambda"),
        ("keep: base", "keep: bse", "'bse' is neither base nor an expert (spam, kjv)"),
        ("method: ties", "method: ties\n  stages: {}", "write either method or stages"),
        ("ktmerge: 1", "ktmerge: 7", "written for schema version 7"),
        ("ktmerge: 1\n", "", "the key 'ktmerge' is missing"),
        ("name: two", "name: two\nname: three", "the key 'name' stands twice (line 4"),
        ("seed: 42", "seed: [", "not valid YAML"),
        (
            "output: {dtype: bfloat16, rounding: nearest}",
            "output: [bfloat16]",
            "output: must be keys with values, not a list.",
        ),
        (
            "output: {dtype: bfloat16, rounding: nearest}",
            "output: bfloat16",
            "output: must be keys with values, not 'bfloat16'.",
        ),
        (
            "experts:\n",
            "experts:\n  poems: runs/poems\n",
            "experts.poems: must be keys with values, such as {model: runs/poems}, not 'runs/poems'.",
        ),
        ("experts:\n", "experts:\n  poems:\n", "experts.poems: must be keys with values, not null."),
        ("seed: 42", "density: 0.2", "unknown key 'density'. If the method has it, it is 'blend.density'. Valid: base"),
        ("seed: 42", "lambda: 0.2", "unknown key 'lambda'. Did you mean 'blend.lambda'?"),
        ("seed: 42", "merge_method: ties", "unknown key 'merge_method'. Did you mean 'blend.method'?"),
        ("seed: 42", "output:\n\tdtype: bfloat16", "a tab at the beginning of a line; indent with spaces"),
        ("spam: {", "base: {", "'base' cannot name an expert"),
        ("spam: {", '"spam\\n": {', "cannot name an expert"),
        ("lambda: 1.0", "lambda: .nan", "blend.lambda"),
        ("lambda: 1.0", "lambda: 1.0e+39", "blend.lambda"),
        ("part: connector, keep: base", "keep: base", "a rule needs one of part, match, class"),
        ("part: connector, keep: base", "part: connector", "a rule needs something to do"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in RECIPE
    assert expected in refused(tmp_path, RECIPE.replace(old, new, 1))


def test_reports_all_mistakes_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, RECIPE.replace("weight", "wieght").replace("rounding", "ruonding"))
    assert len(message.splitlines()) == 2


def test_sends_mergekit_files_to_the_importer(tmp_path: Path) -> None:
    assert "ktmerge recipe import" in refused(tmp_path, "merge_method: ties\nmodels: []\n")


def test_finetune_needs_an_expert_of_that_name(tmp_path: Path) -> None:
    text = RECIPE + "finetune: {experts: {spma: {data: x.jsonl}}}\n"
    assert "finetune.experts.spma is not one of the experts (spam, kjv)" in refused(tmp_path, text)


def test_learning_rate_may_be_written_without_a_dot(tmp_path: Path) -> None:
    text = RECIPE + "finetune: {experts: {spam: {data: x.jsonl, learning_rate: 1e-4}}}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.finetune is not None
    assert recipe.finetune.experts["spam"].learning_rate == 1e-4
    assert recipe.finetune.experts["spam"].data == ["x.jsonl"]


def test_overrides_change_any_key(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    recipe = load_recipe(path, overrides=["blend.lambda=0.8", "blend.where[1].lambda=0.25", "output.dtype=float32"])
    assert recipe.blend is not None
    assert recipe.blend.lambda_ == 0.8
    assert recipe.blend.where[1].lambda_ == 0.25
    assert recipe.output.dtype == "float32"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("blend.lamda=0.8", "unknown"),
        ("blend.where[9].lambda=1", "there is no item [9] in blend.where"),
        ("blend.lambda", "write key=value"),
        ("name.first=1", "name has no keys inside"),
        ("=3", "write key=value"),
        ("blend[0]lambda=1", "write key=value"),
        ('experts."spam=1', "write key=value"),
        (f"blend.where[{'9' * 50}].lambda=1", "write key=value"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, expected: str) -> None:
    if override == "blend.lamda=0.8":  # a method parameter as far as the recipe knows; the plan refuses it
        recipe = load_recipe(write(tmp_path, RECIPE), overrides=[override])
        assert recipe.blend is not None
        assert recipe.blend.parameters["lamda"] == 0.8
    else:
        assert expected in refused(tmp_path, RECIPE, overrides=[override])


def test_every_legal_name_can_be_said_in_a_key(tmp_path: Path) -> None:
    names = ["qwen2.5", "a", "a.weight", "a.weight.b", "9", "9.", "x..y", "no", "-".join("xyz")]
    path = write(tmp_path, RECIPE.replace("spam:", "qwen2.5:"))
    document: dict[str, Any] = {"experts": {name: {"model": "m"} for name in names}}
    for number, name in enumerate(names):
        key = key_of("experts", name, "weight")
        assert steps_of(key) == ["experts", name, "weight"]
        apply_overrides(document, [f"{key}={number}"])
    assert document == {"experts": {name: {"model": "m", "weight": number} for number, name in enumerate(names)}}
    assert load_recipe(path, overrides=['experts."qwen2.5".weight=0.25']).experts["qwen2.5"].weight == 0.25
    with pytest.raises(UsageError, match=r"goes in quotes: 'experts\.\"qwen2\.5\"\.weight'"):
        load_recipe(path, overrides=["experts.qwen2.5.weight=0.25"])


@pytest.mark.parametrize("number", ["1:30", "0:10.5", "010", "-00"])
def test_numbers_to_other_bases_are_refused(tmp_path: Path, number: str) -> None:
    assert f"{number} is not the number it looks like" in refused(
        tmp_path, RECIPE.replace("weight: 0.5", f"weight: {number}")
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("\n".join(["a0: &a0 1", *(f"a{i}: &a{i} {'[' * 90}*a{i - 1}{']' * 90}" for i in range(1, 40))]), "too deeply"),
        ("description: !!null something else", "no tags such as tag:yaml.org,2002:null"),
        ("description: !house text", "no tags such as !house"),
        (f"? {'k' * 100_000}\n: 1", "kkk...'"),
        (f"seed: {'x' * 100_000}", "xxx..."),
        ("\n".join(f"unknown{number}: 1" for number in range(300)), " more of that kind."),
    ],
    ids=["aliases", "null", "own tag", "key", "value", "many"],
)
def test_what_nobody_writes_by_hand_is_refused_briefly(tmp_path: Path, more: str, expected: str) -> None:
    told = refused(tmp_path, RECIPE.replace("seed: 42", more))
    assert expected in told
    assert len(told) < 20_000


def test_a_recipe_of_the_gallery_is_called_by_its_name() -> None:
    with pytest.raises(UsageError, match=r"^ties: blend\.lambda: "):
        load_recipe("ties", overrides=["blend.lambda=much"])


def test_a_bundle_is_told_from_a_recipe(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "r.ktr", "w") as bundle:
        bundle.writestr("recipe.yaml", RECIPE)
    with pytest.raises(UsageError, match=r"r.ktr: is a bundle; 'ktmerge recipe unpack .*r.ktr --out FOLDER'"):
        load_recipe(tmp_path / "r.ktr")


def test_a_name_is_no_longer_than_a_bundle_takes(tmp_path: Path) -> None:
    assert "at most 200 characters" in refused(tmp_path, re.sub(r"(?m)^name: .*$", f"name: {'x' * 201}", RECIPE))


def test_an_expert_named_twice_on_the_command_line_is_refused() -> None:
    with pytest.raises(UsageError, match="--expert: 'a' is given more than once"):
        load_recipe("ties", base="org/base", experts=["a=org/one", "b=org/two", "a=org/three"])


def test_an_existing_folder_with_a_colon_is_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:1").mkdir()
    expert = load_recipe("ties", base="org/base", experts=["a=run:1"]).experts["a"]
    assert (expert.model, expert.weight) == (str(tmp_path / "run:1"), 1.0)


def test_base_and_experts_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned").mkdir()
    recipe = load_recipe("ties", base="org/base@main", experts=["a=tuned:0.25", "b=org/other"])
    assert recipe.base == "org/base@main"
    assert recipe.experts["a"].model == str(tmp_path / "tuned")
    assert recipe.experts["a"].weight == 0.25
    assert recipe.experts["b"].model == "org/other"


def test_an_expert_without_a_name_is_called_as_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/my poems").mkdir(parents=True)
    recipe = load_recipe("ties", base="org/base", experts=["runs/my poems/", "org/spam@v1:0.5", "runs/..:2"])
    found = {name: (one.model, one.weight) for name, one in recipe.experts.items()}
    assert found == {
        "my-poems": (str(tmp_path / "runs/my poems"), 1.0),
        "spam": ("org/spam@v1", 0.5),
        tmp_path.name: (str(tmp_path / "runs/.."), 2.0),
    }
    with pytest.raises(UsageError, match="write name=model"):
        load_recipe("ties", base="org/base", experts=[""])


def test_one_expert_or_override_may_be_a_text() -> None:
    recipe = load_recipe("ties", base="org/base", experts="spam=org/spam", overrides="blend.lambda=0.5")
    assert (list(recipe.experts), recipe.blend and recipe.blend.lambda_) == (["spam"], 0.5)


def test_unknown_gallery_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"neither a file nor a recipe of the gallery\. Did you mean 'ties'"):
        load_recipe("tise")


@pytest.mark.parametrize("load", [load_recipe, load_suite])
def test_a_file_that_is_called_alike_is_named(tmp_path: Path, load: Callable[[Path], object]) -> None:
    (tmp_path / "suite.yaml").touch()
    with pytest.raises(UsageError, match=r"siute\.yaml: no such .*file\. Did you mean 'suite\.yaml'\?"):
        load(tmp_path / "siute.yaml")


def test_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"nowhere/r\.yaml: no such recipe file"):
        load_recipe("nowhere/r.yaml")


class TestUntrustedInput:
    def test_no_code(self, tmp_path: Path) -> None:
        message = refused(tmp_path, RECIPE.replace("two", '!!python/object/apply:os.system ["true"]'))
        assert "no tags such as tag:yaml.org,2002:python/object/apply:os.system" in message

    def test_alias_bomb(self, tmp_path: Path) -> None:
        bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
        assert "once aliases are expanded" in refused(tmp_path, bomb)

    @pytest.mark.parametrize(
        "value",
        [
            "2001-99-99",
            "2001-01-01",
            "2001-12-14t21:59:43.10-05:00",
            "!!int x",
            "!!timestamp x",
            "!!bool x",
            "!!map [1]",
            "9" * 5000,
            "0x" + "f" * 9000,
            "1:" * 5000 + "1",
            "1:" * 5000 + "1.5",
        ],
    )
    def test_values_that_are_not_what_they_look_like(self, tmp_path: Path, value: str) -> None:
        assert "not valid YAML" in refused(tmp_path, f"ktmerge: 1\nname: {value}\n")

    @pytest.mark.parametrize("key", ["1", "no", "~", "1.5", "=", "2001-01-01", "? [a, b]\n"])
    def test_keys_that_are_no_text(self, tmp_path: Path, key: str) -> None:
        told = refused(tmp_path, RECIPE + f"{key}: x\n")
        assert f"the key '{'[...]' if '[' in key else key}' is no text to YAML; put it in quotes" in told

    def test_alias_inside_itself(self, tmp_path: Path) -> None:
        assert refused(tmp_path, "a: &a [*a]\n")

    def test_size_limit(self, tmp_path: Path) -> None:
        assert "at most" in refused(tmp_path, "#" * 1_000_001)

    def test_deep_nesting(self, tmp_path: Path) -> None:
        assert "nested too deeply" in refused(tmp_path, "[" * 5000 + "]" * 5000)
        assert "nested too deeply" in refused(tmp_path, "? " * 5000)

    def test_many_values(self, tmp_path: Path) -> None:
        """Refused by their number, before anything is built of them."""
        assert "more than 100000 values" in refused(tmp_path, "[" + "1," * 400_000 + "1]")

    def test_two_documents(self, tmp_path: Path) -> None:
        assert "expected a single document" in refused(tmp_path, "a: 1\n---\nb: 2\n")

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsageError, match="UTF-8"):
            load_recipe(path)

    def test_not_a_mapping(self, tmp_path: Path) -> None:
        assert "a recipe is a mapping" in refused(tmp_path, "- 1\n")


class TestSuites:
    TASK = "{name: a, kind: choice, data: a.jsonl, prompt: p, choices: [x, y], answer: '0'}"

    def test_inline_and_in_a_file_are_the_same(self, tmp_path: Path) -> None:
        write(tmp_path, f"upstream: [{self.TASK}]", "suite.yaml")
        in_file = load_recipe(write(tmp_path, RECIPE + "eval: {suite: suite.yaml}\n"))
        inline = load_recipe(write(tmp_path, RECIPE + f"eval: {{upstream: [{self.TASK}]}}\n"))
        assert suite_of(in_file).upstream == suite_of(inline).upstream
        assert suite_of(in_file).folder == suite_of(inline).folder == tmp_path

    def test_unknown_task_key(self, tmp_path: Path) -> None:
        path = write(tmp_path, f"upstream: [{self.TASK.replace('prompt', 'prmpt')}]")
        with pytest.raises(UsageError) as caught:
            load_suite(path)
        assert "unknown key 'upstream[0].prmpt'. Did you mean 'prompt'?" in str(caught.value)

    def test_unknown_kind(self, tmp_path: Path) -> None:
        path = write(tmp_path, f"upstream: [{self.TASK.replace('choice,', 'chioce,')}]")
        with pytest.raises(
            UsageError, match=r":1: upstream\[0\]\.kind: there is no kind 'chioce'\. Did you mean 'choice'"
        ):
            load_suite(path)

    @pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "(" * 5000 + ")" * 5000])
    def test_what_is_no_regular_expression(self, tmp_path: Path, pattern: str) -> None:
        task = f"{{name: a, kind: generate, data: a.jsonl, prompt: p, answer: x, extract: '{pattern}'}}"
        with pytest.raises(UsageError, match=r"extract: not a regular expression: "):
            load_suite(write(tmp_path, f"upstream: [{task}]"))

    def test_names_are_unique(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="two tasks are called 'a'"):
            load_suite(write(tmp_path, f"upstream: [{self.TASK}]\ndownstream: [{self.TASK}]"))

    def test_an_empty_suite_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="at least one task"):
            load_suite(write(tmp_path, "name: x"))


def test_recipes_survive_a_round_trip(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE))
    again = parse_recipe(recipe.model_dump(mode="json", by_alias=True), "again", tmp_path)
    assert again == recipe


def test_an_adapter_that_is_no_change_of_weights_is_not_blended(tmp_path: Path) -> None:
    tuned = RECIPE + "finetune: {experts: {spam: {data: spam.jsonl, adapter: prompt}}}\n"
    assert "finetune.experts.spam: prompt is no change of weights" in refused(tmp_path, tuned)
    assert load_recipe(write(tmp_path, tuned.replace("prompt", "lora"))).finetune is not None


def test_mistakes_are_told_with_their_line(tmp_path: Path) -> None:
    text = RECIPE.replace("lambda: 1.0", "lambda: much").replace("name: two", "name: two words")
    told = refused(tmp_path, text).splitlines()
    assert [line.removeprefix(str(tmp_path)).split(": ")[0] for line in told] == ["/r.yaml:3", "/r.yaml:11"]
    assert "letters, digits and _ . - make a name" in told[0]
    overridden = refused(tmp_path, text, overrides=["seed=1"]).splitlines()  # other keys than the file's
    assert overridden[0].startswith(f"{tmp_path}/r.yaml: ")
    suite = write(tmp_path, "upstream:\n- name: a\n  kind: text\n  data: x.jsonl\n- name: b\n  kind: text\n", "s.yaml")
    with pytest.raises(UsageError, match=r"s\.yaml:5: the key 'upstream\[1\]\.data' is missing"):
        load_suite(suite)


def test_a_suite_knows_the_lines_of_its_tasks(tmp_path: Path) -> None:
    task = "{name: %s, kind: text, data: x.jsonl}"
    path = write(tmp_path, f"upstream:\n  - {task % 'a'}\n\ndownstream:\n  - {task % 'b'}\n", "s.yaml")
    assert load_suite(path).places == {"a": f"{path}:2", "b": f"{path}:5"}
    assert "places" not in load_suite(path).model_dump()
