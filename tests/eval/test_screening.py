"""Measurements without labels, against float64 numpy and answers found one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval import Screened, screen
from ktmerge.eval.loading import load_model
from ktmerge.eval.screened import ScreenedSet
from ktmerge.recipes.suites import Suite

PLACES = ["fox", "dog", "earth", "Paris", "review"]
CHOICES = ["yes", "no way", "the three"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Answers are given, and all wrong: nothing here may look at them."""
    folder = tmp_path_factory.mktemp("sets")
    rows = [{"q": f"The {place} is", "o": CHOICES} for place in PLACES]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"data": "x.jsonl", "prompt": "{{ q }}", "answer": "0"}
    return Suite(
        upstream=[{"name": "facts", "kind": "choice", "choices": "o", **common},
                  {"name": "prose", "kind": "text", "data": "x.jsonl", "text": "{{ q }} good and bad"}],
        downstream=[{"name": "pick", "kind": "choice", "choices": "o", **common},
                    {"name": "say", "kind": "generate", "max_new_tokens": 4, "stop": [], **common}],
        folder=folder,
    )  # fmt: skip


@pytest.fixture(scope="module")
def half(tiny_llama: Path, tuned_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half-way between the two."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("half") / "llama"
    shutil.copytree(tiny_llama, folder)
    a, b = (load_file(one / "model.safetensors") for one in (tiny_llama, tuned_llama))
    mean = {name: ((a[name].float() + b[name].float()) / 2).to(a[name].dtype) for name in a}
    save_file(mean, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def softmax(model: Any, ids: list[int]) -> Any:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl(teacher: Any, student: Any, ids: list[int], start: int) -> float:
    p, q = (softmax(one, ids[:-1])[start - 1 :] for one in (teacher, student))
    return float((p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.slow
def test_distances_are_kl_on_prompts_and_on_the_experts_own_answers(
    tiny_llama: Path, tuned_llama: Path, half: Path, sets: Suite, tokenizer: Any
) -> None:
    found = screen({"half": half, "tuned": tuned_llama}, sets, base=tiny_llama, experts={"tuned": tuned_llama},
                   bootstrap=100, device="cpu", weight=0.25)  # fmt: skip
    base, expert, student = (load_model(one, torch.device("cpu"), torch.float32)
                             for one in (tiny_llama, tuned_llama, half))  # fmt: skip
    prompts = [tokenizer.encode(f"The {place} is") for place in PLACES]
    wanted = {"facts": [kl(base, student, [*ids, 5], 1) for ids in prompts]}
    wanted["prose"] = [kl(base, student, tokenizer.encode(f"The {place} is good and bad"), 1) for place in PLACES]
    wanted["pick"], wanted["say"] = [], []
    for place, ids in zip(PLACES, prompts, strict=True):
        whole = [tokenizer.encode(f"The {place} is {choice}") for choice in CHOICES]
        sums = [sum(np.log(softmax(expert, one)[at - 1, one[at]]) for at in range(len(ids), len(one))) for one in whole]
        wanted["pick"].append(kl(expert, student, whole[int(np.argmax(sums))], len(ids)))
        said = list(ids)
        for _ in range(4):
            said.append(int(softmax(expert, said)[-1].argmax()))
        assert tokenizer.eos_token_id not in said
        answer = tokenizer.encode(tokenizer.decode(said[len(ids) :]), add_special_tokens=False)
        wanted["say"].append(kl(expert, student, ids + answer, len(ids)))
    for one in found.sets:
        np.testing.assert_allclose(one.values[0], wanted[one.task], rtol=2e-4)
        assert (one.values[1] < 1e-9).all() == (one.teacher == "tuned"), "the expert is nowhere apart from itself"
    mean = {task: np.mean(values) for task, values in wanted.items()}
    up, down = (mean["facts"] + mean["prose"]) / 2, (mean["pick"] + mean["say"]) / 2
    numbers = found.numbers["half"]
    assert (numbers.to_base.value, numbers.to_experts.value) == pytest.approx((up, down), rel=2e-4)
    assert numbers.J.value == pytest.approx(0.25 * down + 0.75 * up, rel=2e-4)
    assert numbers.J.low <= numbers.J.value <= numbers.J.high
    assert numbers.disagreement is None


@pytest.mark.slow
def test_an_expert_is_asked_on_the_set_of_its_name(tiny_llama: Path, tuned_llama: Path, sets: Suite) -> None:
    found = screen({"base again": tiny_llama}, sets, base=tiny_llama, bootstrap=20, device="cpu",
                   experts={"say": tuned_llama, "other": tuned_llama})  # fmt: skip
    assert [(one.task, one.teacher) for one in found.sets if one.side == "downstream"] == [
        ("pick", "say"), ("say", "say"), ("pick", "other"),
    ]  # fmt: skip
    assert found.numbers["base again"].to_base.value == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_neighbours_on_a_line(tiny_llama: Path, tuned_llama: Path, half: Path, sets: Suite) -> None:
    from ktmerge.eval import disagreement, evaluate

    models = {"0": tiny_llama, "0.5": half, "0.75": half, "1": tuned_llama}
    found = screen(models, sets, base=tiny_llama, line=True, bootstrap=50, device="cpu")
    told = evaluate({"base": tiny_llama, **models}, sets, device="cpu", bootstrap=10)
    wanted = []
    for task in ("facts", "pick", "say"):
        details = {float(name): told.scores[name][task].details for name in models}
        answers = {
            name: one.get("outputs") or [str(np.argmax(own)) for own in one["logprobs"]]
            for name, one in details.items()
        }
        wanted.append(disagreement(answers))
    for name in models:
        mean = 100 * np.mean([one[float(name)] for one in wanted])
        assert found.numbers[name].disagreement.value == pytest.approx(mean)
    assert found.calmest in models
    assert {one.teacher for one in found.sets} == {"base", "neighbours"}


def made(values: dict[str, list[float]]) -> Screened:
    up, down = (np.array(list(values.values())) * factor for factor in (1, 3))
    names = list(values)
    items = list(range(up.shape[1]))
    sets = [ScreenedSet("u", "upstream", "base", up, items), ScreenedSet("d", "downstream", "e", down, items)]
    return Screened("s", "digest", names, "base", {"e": "e"}, dict.fromkeys(names, "x"), sets, bootstrap=400)


def test_what_cannot_be_told_from_the_best_is_said(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random(200)
    wobble = np.where(np.arange(200) % 2, 1e-3, -1e-3) + 1e-5
    found = made({"best": noise, "near": noise + wobble, "far": noise + 0.1})
    assert found.best == "best"
    assert found.numbers["best"].behind.value == found.numbers["best"].behind.high == 0
    assert found.numbers["far"].behind.value == pytest.approx(0.2)
    assert found.numbers["far"].behind.low > 0.19, "the items' noise is shared and cancels"
    assert "smallest J: best; not to be told from it: near" in found.notes()
    found.save(tmp_path / "s.json")
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["ktmerge_screen"] == 1
    assert document["models"]["far"]["behind"]["value"] == pytest.approx(0.2)
    assert document["sets"][1]["values"]["near"] == found.sets[1].values[1].tolist()


def test_intervals_are_a_paired_bootstrap() -> None:
    """Against the normal interval of the mean, which that of many items is close to."""
    values = np.random.default_rng(1).exponential(size=3000)
    one = made({"a": values}).numbers["a"].to_base
    error = 1.96 * values.std(ddof=1) / np.sqrt(3000)
    assert (one.value, one.low, one.high) == pytest.approx(
        (values.mean(), values.mean() - error, values.mean() + error), abs=0.15 * error
    )


def test_teachers_of_one_set_are_asked_the_same_items() -> None:
    """Two teachers that say the same know no more than one."""
    values = np.random.default_rng(2).exponential(size=(1, 80))
    sets = [ScreenedSet("d", "downstream", name, values, list(range(80))) for name in ("a", "b")]
    one, two = (
        Screened("s", "digest", ["m"], "base", {}, {"m": "x"}, sets[:count], bootstrap=300).numbers["m"].to_experts
        for count in (1, 2)
    )
    assert one == two


def test_chunks_of_a_text_count_together() -> None:
    texts = np.random.default_rng(3).exponential(size=(1, 40))
    chunks, groups = np.repeat(texts, 6, axis=1), np.repeat(np.arange(40), 6).tolist()
    sets = [
        ScreenedSet("u", "upstream", "base", texts, list(range(40))),
        ScreenedSet("u", "upstream", "base", chunks, groups),
    ]
    whole, cut = (one.means(200, 0) for one in sets)
    np.testing.assert_allclose(cut, whole, rtol=1e-12)


def test_what_cannot_be_measured_is_named(tiny_llama: Path, tuned_llama: Path, sets: Suite, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for arguments, said in (
        ({"models": {}}, "name at least one model"),
        ({"line": True}, "at least two models on the line"),
        ({"weight": 1.5}, "must be from 0 to 1"),
    ):
        with pytest.raises(UsageError, match=said):
            screen(**{"models": {"a": tuned_llama}, "suite": sets, "base": tiny_llama, "device": "cpu", **arguments})
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KtmergeError, match=r"^a: facts, text \d: the model's logits are not finite"):
        screen({"a": broken}, sets, base=tiny_llama, device="cpu")
    with pytest.raises(KtmergeError, match=r"^e: pick: .* not finite|^e: pick, text \d: the model's logits"):
        screen({"a": tiny_llama}, sets, base=tiny_llama, experts={"e": broken}, device="cpu")
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}x")
    with pytest.raises(UsageError, match="'a' has another tokenizer or chat template"):
        screen({"a": other}, sets, base=tiny_llama, device="cpu")


@pytest.mark.slow
def test_on_the_command_line(
    tiny_llama: Path, tuned_llama: Path, sets: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ktmerge.cli import _exit_code

    suite = {side: [one.model_dump(mode="json", exclude_none=True) for one in getattr(sets, side)]
             for side in ("upstream", "downstream")}  # fmt: skip
    (tmp_path / "s.yaml").write_text(json.dumps(suite))
    shutil.copy(sets.folder / "x.jsonl", tmp_path)
    asked = ["eval", f"a={tuned_llama}", f"b={tiny_llama}", "--base", str(tiny_llama), "--suite",
             str(tmp_path / "s.yaml"), "--device", "cpu"]  # fmt: skip
    told = [*asked, "--without-labels", "--expert", f"e={tuned_llama}", "-o", str(tmp_path / "out.json")]
    assert _exit_code(told) == 0
    printed = capsys.readouterr().out
    assert "KL to experts" in printed
    assert "J = 0.5 (to experts) + 0.5 (to base)" in printed
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["models"]["a"]["to_experts"]["value"] == pytest.approx(0, abs=1e-9)
    assert document["models"]["b"]["to_base"]["value"] == pytest.approx(0, abs=1e-9)
    for wrong in ([*asked, "--line"], [*asked, "--weight", "0.2"], [*told, "--reference", "a", "--overwrite"], told):
        assert _exit_code(wrong) == 2
    assert "out.json exists" in capsys.readouterr().err
