"""Fine-tunes of adapters: what they come to as weights, and as folders that are attached again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import seeing
import torch
from pydantic import ValidationError
from stopping import StopsAt
from test_images_train import tune as seeing_tune
from tuning import JOB, Listener, tune, weights

from ktmerge.adapters.bottleneck import attach_bottlenecks
from ktmerge.adapters.saved import attach_saved
from ktmerge.adapters.visual import VisualPrompt
from ktmerge.api import blend, evaluate
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.adapters import FAMILIES
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.load import parse_recipe
from ktmerge.tuners.adapters import penalties, saving

SHORT: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-2, "warmup": 0, "show_samples": 0}
MINIMAL: dict[str, dict[str, Any]] = {"oft": {"block": 16}, "boft": {"block": 16}, "corda": {"data": ["chats.jsonl"]}}
FOLDED = sorted(name for name, family in FAMILIES.items() if family.folds)
IDS = torch.arange(3, 27).view(2, 12)


def settings_of(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **({"rank": 4} if "rank" in FAMILIES[name].takes else {}), **MINIMAL.get(name, {}), **more}


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def says(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    return found[:, -IDS.shape[1] :]


def moved(base: Path, out: Path) -> set[str]:
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].float().equal(after[name].float())}


def require_folded(base: Path, folder: Path, targets: str) -> None:
    """The dense weights say what PEFT says with the kept adapter over the base; other tensors kept their bytes."""
    from peft import PeftModel

    attached = says(PeftModel.from_pretrained(load(base), str(folder / "out-adapter")).eval())
    folded = says(load(folder / "out"))
    assert float((attached - folded).abs().max()) < 2e-6
    assert float((folded - says(load(base))).abs().max()) > 1e-3
    names = moved(base, folder / "out")
    assert names
    assert all(targets in name and name.endswith("proj.weight") for name in names)
    before, after = Checkpoint.open(base), Checkpoint.open(folder / "out")
    assert {n: (i.shape, i.dtype) for n, i in after.tensors.items() if n not in names} == {
        n: (i.shape, i.dtype) for n, i in before.tensors.items() if n not in names
    }


@pytest.mark.slow
def test_an_adapter_trained_in_bfloat16_is_held_to_its_logits_in_float32(tiny_llama: Path, tmp_path: Path) -> None:
    told = tune(tiny_llama, tmp_path, adapter="lora", precision="bfloat16", **SHORT).record["run"]["folded"]
    assert told["largest_logit_difference"] < told["tolerance"]


def test_a_lora_is_folded_and_kept(tiny_llama: Path, tmp_path: Path) -> None:
    listener = Listener()
    report = tune(
        tiny_llama, tmp_path, adapter=settings_of("lora", keep=True), train="last:1", progress=listener, **SHORT
    )
    require_folded(tiny_llama, tmp_path, "layers.1.")
    told = report.record["run"]["folded"]
    assert told["tensors"] == 7
    assert told["largest_logit_difference"] < told["tolerance"]
    assert any("lora in llm.layers[1:2]" in note for note in listener.notes)
    config = json.loads((tmp_path / "out-adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_llama.name
    targets = config["target_modules"]  # a set in PEFT: without being sorted, in another order in every process
    assert len(targets) == 7
    assert targets == sorted(targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FOLDED if name != "lora"])
def test_every_family_that_folds_says_the_same_in_weights(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    rate = {"ia3": 0.1, "vera": 0.1, "lora+": 1e-3, "boft": 1e-2}.get(name, 1e-2)
    settings = {**SHORT, "learning_rate": rate}
    tune(tiny_llama, tmp_path, adapter=settings_of(name, keep=True), **settings)
    require_folded(tiny_llama, tmp_path, "layers.")


@pytest.mark.slow
def test_a_folded_model_in_the_type_of_the_base_is_rounded_once(tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, adapter=settings_of("pissa"), **SHORT)
    tune(tiny_llama, tmp_path, "small", adapter=settings_of("pissa"), save_dtype="base", **SHORT)
    whole, small = weights(tmp_path / "out"), weights(tmp_path / "small")
    assert all(small[name].equal(whole[name].to(torch.bfloat16)) for name in whole)


@pytest.mark.slow
def test_a_difference_that_rounding_does_not_explain_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktmerge.tuners.adapters import folding

    monkeypatch.setattr(folding, "TOLERANCE", 0.0)
    with pytest.raises(KtmergeError, match="folded into the weights, logits are off by"):
        tune(tiny_llama, tmp_path, adapter=settings_of("dora"), **SHORT)
    assert not (tmp_path / "out").exists()


ATTACHED = ["prompt", "p-tuning", "prefix", "llama-adapter", "bottleneck", "conditioned", "xlora"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACHED)
def test_what_cannot_be_folded_is_attached_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The saved folder says what the trained model said in memory, and `evaluate` scores it so."""
    if name == "xlora":
        for seed, expert in enumerate(("first", "second")):
            tune(tiny_llama, tmp_path, expert, adapter=settings_of("lora", keep=True), seed=seed, **SHORT)
        monkeypatch.setitem(MINIMAL, "xlora", {"experts": ["first-adapter", "second-adapter"]})
    trained: list[torch.Tensor] = []
    plain = saving.save_adapter

    def remembering(adapted: Any, folder: Path) -> None:
        trained.append(says(adapted.model.eval()))
        plain(adapted, folder)

    monkeypatch.setattr(saving, "save_adapter", remembering)
    tune(tiny_llama, tmp_path, adapter=settings_of(name), **{**SHORT, "learning_rate": 0.1, "max_steps": 10})
    assert not (tmp_path / "out/model.safetensors").exists()
    for expert in ("first-adapter", "second-adapter"):
        if name == "xlora":
            os.rename(tmp_path / expert, tmp_path / f"gone-{expert}")  # the result has them inside
    found = attach_saved(load(tiny_llama), tmp_path / "out")
    assert float((says(found) - trained[0]).abs().max()) < 1e-6
    assert float((trained[0] - says(load(tiny_llama))).abs().max()) > 1e-2
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"q": f"Is {n} good?", "a": n % 2}) + "\n" for n in (1, 2))
    )
    results = evaluate(
        [f"alone={tmp_path / 'out'}", f"over={tiny_llama}+{tmp_path / 'out'}"],
        suite=tmp_path / "suite.yaml",
        base=tiny_llama,
        cache=False,
    )
    logprobs = {model: scores["asked"].details["logprobs"] for model, scores in results.scores.items()}
    assert logprobs["alone"] == logprobs["over"]
    assert not np.allclose(logprobs["alone"], logprobs["base"], atol=1e-3)
    assert np.allclose(logprobs["alone"], [independent(found, tiny_llama, n) for n in (1, 2)], atol=1e-4)
    assert results.models["over"].path == f"{tiny_llama}+{tmp_path / 'out'}"


SUITE = """
ktmerge_suite: 1
name: asked
upstream:
  - {name: asked, kind: choice, data: asked.jsonl, prompt: "{{q}}", choices: [" yes", " no"], answer: "{{a}}"}
downstream: []
"""


def independent(model: Any, base: Path, number: int) -> list[float]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for choice in (" yes", " no"):
        before = len(tokenizer(f"Is {number} good?")["input_ids"])
        ids = torch.tensor([tokenizer(f"Is {number} good?{choice}")["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        logs = logits.log_softmax(-1)
        found.append(sum(float(logs[place - 1, ids[0, place]]) for place in range(before, ids.shape[1])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [("pissa", {"dropout": 0.3}), ("adalora", {}), ("lora", {"orthogonal": 0.1, "b_rate": 4}), ("prompt", {}),
     ("conditioned", {})],
)  # fmt: skip
def test_a_stopped_run_resumes_to_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    settings = {**SHORT, "max_steps": 10, "adapter": settings_of(name, **more)}
    file = "model.safetensors" if FAMILIES[name].folds else "adapter_model.safetensors"
    tune(tiny_llama, tmp_path, "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **settings, progress=StopsAt(6))
    listener = Listener()
    report = tune(tiny_llama, tmp_path, **settings, resume=True, progress=listener)
    assert any("going on after step 6 of 10" in note for note in listener.notes)
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    digest = hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest()
    assert report.record["output"]["sha256"] == {file: digest}
    assert not (tmp_path / "out.partial").exists()
    again = tune(tiny_llama, tmp_path, **settings, resume=True, progress=listener)
    assert "already what the job asks for" in listener.notes[-1]
    assert again.record["run"]["steps"] == 10


@pytest.mark.slow
def test_adapters_of_a_model_that_sees(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA goes into the language part alone; the visual prompt into what the connector emits."""
    from transformers import AutoModelForImageTextToText

    base = seeing.build("llava", tmp_path / "base", tiny_llama)
    short = {"learning_rate": 1e-2, "show_samples": 0}
    seeing_tune(base, tmp_path, adapter=settings_of("lora"), **short)
    names = moved(base, tmp_path / "out")
    assert len(names) == 14
    assert all(name.startswith("language_model.") and name.endswith("_proj.weight") for name in names)
    trained: list[Any] = []
    plain = saving.save_adapter
    given = _picture_of(base)

    def remembering(adapted: Any, folder: Path) -> None:
        with torch.no_grad():
            trained.append(adapted.model.eval()(**given).logits)
        plain(adapted, folder)

    monkeypatch.setattr(saving, "save_adapter", remembering)
    seeing_tune(base, tmp_path, "visual", adapter={"name": "visual-prompt", "tokens": 2}, **short)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(**given).logits
        after = attach_saved(model, tmp_path / "visual")(**given).logits
    assert after.equal(trained[0])
    assert float((after - before).abs().max()) > 1e-4


@pytest.mark.slow
def test_kept_adapters_are_experts_of_a_blend(tiny_llama: Path, tmp_path: Path) -> None:
    """One alone is the folded model, whatever it began as; two are mixed as their changes are."""
    for name in ("milora", "dora"):
        tune(tiny_llama, tmp_path, name, adapter=settings_of(name, keep=True), **SHORT)
    for out, experts in (("alone", {"a": 1.0}), ("mixed", {"a": 0.5, "b": 0.5})):
        models = {"a": "milora-adapter", "b": "dora-adapter"}
        document = {
            "ktmerge": 1, "base": str(tiny_llama), "output": {"dtype": "float32"},
            "experts": {name: {"model": models[name], "weight": weight} for name, weight in experts.items()},
            "blend": {"method": "linear", "lambda": 1},
        }  # fmt: skip
        blend(parse_recipe(document, "here", tmp_path), tmp_path / out)
    first, second, base = (weights(path) for path in (tmp_path / "milora", tmp_path / "dora", tiny_llama))
    alone, mixed = weights(tmp_path / "alone"), weights(tmp_path / "mixed")
    for name in base:
        assert torch.allclose(alone[name], first[name].float(), rtol=0, atol=1e-7), name
        expected = (first[name].double() + second[name].double()) / 2
        assert torch.allclose(mixed[name].double(), expected, rtol=0, atol=1e-6), name


def _picture_of(base: Path) -> dict[str, torch.Tensor]:
    """A prompt that is one image, with the tokens that this model has for it."""
    config = json.loads((base / "config.json").read_text())
    count = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    ids = torch.tensor([[5, *[config["image_token_index"]] * count, 6, 7]])
    size = config["vision_config"]["image_size"]
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.slow
def test_everything_that_keeps_the_base_works_with_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    report = tune(
        tiny_llama, tmp_path, adapter=settings_of("lora", keep=True), replay=["chats.jsonl"], distill=1.0,
        average="ema", eval_upstream="chats.jsonl", eval_every=2, activation_checkpointing=True, **SHORT,
    )  # fmt: skip
    require_folded(tiny_llama, tmp_path, "layers.")  # both are the average
    assert report.record["run"]["average"]["kind"] == "ema"
    stopped = tune(
        tiny_llama, tmp_path, "guarded", adapter=settings_of("lora"), stop_upstream=0.0, eval_upstream="chats.jsonl",
        eval_every=2, **{**SHORT, "learning_rate": 0.9},
    )  # fmt: skip
    assert stopped.record["run"]["result_of_step"] == 0
    assert not moved(tiny_llama, tmp_path / "guarded")  # B is zero again, so the fold is the base


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": {"name": "lora", "tokens": 3}}, "lora takes no tokens; that is for prompt"),
        ({"adapter": "corda"}, "needs data"),
        ({"adapter": {"name": "prompt", "keep": True}}, "leave keep out"),
        ({"adapter": "lora", "select": "magnitude"}, "select chooses elements of the model's own weights"),
        ({"adapter": "lora", "l2_sp": 1.0}, "l2_sp pulls the model's own weights"),
        ({"adapter": "lora", "average": "ema", "export": "both"}, "folded once; choose average or last"),
        ({"adapter": "prompt", "distill": 1.0}, "an untrained prompt is not the base"),
        ({"adapter": "prompt", "train": "last:1"}, "prompt has a place of its own"),
        ({"adapter": "conditioned", "packing": True}, "leave packing out"),
        ({"adapter": "lorra"}, "should be one of lora, .* \\(did you mean 'lora'\\)"),
        ({"adapter": '{"name": "lora"}'}, "takes the name of a family alone, e.g. lora"),
        ({"adapter": ["lora"]}, "takes the name of a family, or that and its settings"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FinetuneJob.model_validate({**JOB, **settings})


def test_the_rate_is_the_familys_unless_given() -> None:
    plain = FinetuneJob.model_validate({"data": "x", "adapter": "lora"})
    assert plain.learning_rate == FAMILIES["lora"].rate
    other = FinetuneJob.model_validate({**plain.model_dump(exclude_unset=True), "adapter": "prompt"})
    assert other.learning_rate == FAMILIES["prompt"].rate
    assert FinetuneJob.model_validate({"data": "x", "adapter": "lora", "learning_rate": 1e-5}).learning_rate == 1e-5


@pytest.mark.slow
def test_places_that_are_not_there_are_refused_before_anything_is_made(tiny_llama: Path, tmp_path: Path) -> None:
    for adapter, train, said in (
        ("visual-prompt", "full", "'connector' matches no tensor"),
        ({"name": "lora", "modules": ["q_prj"]}, "full", r"has no 'q_prj'\. Did you mean 'q_proj'"),
        ("lora", "embed", "no linear maps"),
        ({"name": "oft", "block": 48}, "full", "does not divide the 64 inputs"),
        ({"name": "milora", "rank": 65}, "full", "singular directions"),
    ):
        with pytest.raises(UsageError, match=said):
            tune(tiny_llama, tmp_path, adapter=adapter, train=train, **SHORT)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def layer_of(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Any:
    def held(value: torch.Tensor) -> Any:
        return {penalties.ADAPTER: SimpleNamespace(weight=value)}

    base = SimpleNamespace(weight=weight)
    return SimpleNamespace(
        lora_A=held(first), lora_B=held(second), fan_in_fan_out=False, get_base_layer=lambda: base
    )  # fmt: skip


def test_the_penalties_are_those_of_their_papers() -> None:
    random = np.random.default_rng(0)
    weight, first, second = random.normal(size=(6, 5)), random.normal(size=(2, 5)), random.normal(size=(6, 2))
    layer = layer_of(*(torch.tensor(one) for one in (weight, first, second)))
    salience = np.abs(1 / np.log(np.abs(weight) / np.linalg.norm(weight) + 1e-15))
    expected = np.sqrt(np.sum((np.tanh(salience) * (second @ first)) ** 2))
    assert float(penalties.sculpted([layer])) == pytest.approx(expected)
    left, _, right = np.linalg.svd(weight)
    found = penalties._directions("a.map", layer, "principal", 2, 0)
    expected = np.sum((left[:, :2].T @ second) ** 2) + np.sum((first @ right[:2].T) ** 2)
    assert float(penalties.inside([(layer, tuple(one.double() for one in found))])) == pytest.approx(expected, rel=1e-4)
    for one in penalties._directions("a.map", layer, "random", 2, 0):
        assert torch.allclose(one.T @ one, torch.eye(2, dtype=one.dtype), atol=1e-5)


def test_bottlenecks_start_as_the_base_and_look_back_only(tiny_llama: Path) -> None:
    plain = says(load(tiny_llama))
    for conditioned in (False, True):
        model = load(tiny_llama)
        attach_bottlenecks(model, ["model.layers.0", "model.layers.1"], 4, conditioned=conditioned)
        assert says(model).equal(plain)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, one in model.named_parameters():
                if "bottleneck" in name:
                    one.add_(0.3 * torch.randn(one.shape, generator=generator))
        whole = says(model)
        assert not whole.equal(plain)
        with torch.no_grad():
            start = model(input_ids=IDS[:1, :7], attention_mask=torch.ones(1, 7), use_cache=False).logits
            padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
            there = torch.tensor([[0] * 3 + [1] * IDS.shape[1]])
            positions = (there.cumsum(-1) - 1).clamp(min=0)
            shifted = model(input_ids=padded, attention_mask=there, position_ids=positions, use_cache=False).logits
        assert torch.allclose(start[0], whole[0, :7], atol=1e-5)
        assert torch.allclose(shifted[0, 3:], whole[0], atol=1e-5)


def test_visual_prompts_are_spread_over_the_tokens_of_an_image() -> None:
    module = VisualPrompt(2, 2)
    tokens = torch.zeros(3, 5, 2)
    assert module(tokens).equal(tokens)
    with torch.no_grad():
        module.prompt.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert module(tokens)[1, :, 0].tolist() == [1, 1, 1, 2, 2]
    with pytest.raises(UsageError, match="all images' tokens in one row; use tokens: 1"):
        module(torch.zeros(5, 2))
