"""Adapters on models that see, of six families: what they come to, and that prompts stand where tokens would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeing import FAMILIES as SEEING
from seeing import build
from test_images_train import JOB, prepare, tune
from tuning import write

from ktmerge.adapters.prompt import attach_prompt
from ktmerge.adapters.saved import attach_saved
from ktmerge.api import evaluate
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.parts import Parts
from ktmerge.progress import SILENT
from ktmerge.recipes.adapters import FAMILIES
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.adapters import saving
from ktmerge.tuners.adapters.attach import Surroundings, attach
from ktmerge.tuners.adapters.folding import fold
from ktmerge.tuners.collate import Collator
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoded, Encoder
from ktmerge.tuners.estimate import estimate
from ktmerge.tuners.images.opening import open_encoder
from ktmerge.tuners.loss import for_model
from ktmerge.tuners.model import load_model

SHORT: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "show_samples": 0}
MORE: dict[str, dict[str, Any]] = {
    "oft": {"block": 16}, "boft": {"block": 16}, "corda": {"data": ["seeing.jsonl"]}, "fourierft": {"coefficients": 99},
    "visual-prompt": {}, "xlora": {"experts": ["first-adapter", "second-adapter"]},
}  # fmt: skip
SUITE = """
ktmerge_suite: 1
name: asked
upstream:
  - name: seen
    kind: choice
    data: asked.jsonl
    image: picture
    prompt: "<image> {{q}}"
    choices: [" yes", " no"]
    answer: "{{a}}"
  - {name: said, kind: generate, data: asked.jsonl, image: picture, prompt: "<image> {{q}}", answer: "{{w}}",
     metric: exact_match, max_new_tokens: 4}
downstream: []
"""


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family."""
    folder = tmp_path_factory.mktemp("seeing")
    for family in SEEING:
        build(family, folder / family, tiny_llama)
    return folder


def adapter_of(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **({"rank": 4} if "rank" in FAMILIES[name].takes else {}), **MORE.get(name, {}), **more}


def load(path: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


def samples_of(base: Path, folder: Path, count: int) -> tuple[list[Encoded], Encoder]:
    """The first samples of ``seeing.jsonl``, and what encoded them."""
    samples = read_data(["seeing.jsonl"], folder, "auto", folder / "pictures").samples[:count]
    encoder, _ = open_encoder(Checkpoint.open(base), samples, SILENT)
    return [encoder.encode(sample) for sample in samples], encoder


def batch_of(base: Path, folder: Path, count: int = 2) -> dict[str, torch.Tensor]:
    """They as a model takes them, padded."""
    samples, encoder = samples_of(base, folder, count)
    return for_model(Collator(0, extras=encoder.extras)(samples))


def says(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found[batch["attention_mask"].bool()]


@pytest.mark.every(6)
@pytest.mark.parametrize("family", [name for name in SEEING if name != "paligemma"])
@pytest.mark.parametrize("kind", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_prompt_says_what_tokens_in_its_place_would(models: Path, tmp_path: Path, family: str, kind: str) -> None:
    """Vectors that are the embeddings of words, or their keys and values, are those words before the conversation."""
    prepare(tmp_path)
    model, batch = load(models / family), batch_of(models / family, tmp_path)
    words = torch.tensor([[11, 12, 13]]).expand(2, -1)
    longer = {
        **batch,
        "input_ids": torch.cat([words, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(words), batch["attention_mask"]], 1),
    }
    if "mm_token_type_ids" in batch:
        longer["mm_token_type_ids"] = torch.cat([torch.zeros_like(words), batch["mm_token_type_ids"]], 1)
    with torch.no_grad():
        expected = model(**longer, use_cache=False).logits[:, 3:][batch["attention_mask"].bool()]
        plain = says(model, batch)
        kept = model(input_ids=words[:1], use_cache=True).past_key_values
        vectors = model.get_input_embeddings()(words[0])
    attach_prompt(model, kind, 3)
    inside = model.get_decoder().prompt
    with torch.no_grad():
        if kind == "prompt":
            inside.vectors.copy_(vectors)
        else:
            inside.pairs.copy_(torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in kept.layers]))
    found = says(model, batch)
    assert float((found - expected).abs().max()) < 1e-5
    assert float((found - plain).abs().max()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.folds))
def test_what_folds_says_the_same_in_weights_of_the_language_part(
    models: Path, tmp_path: Path, family: str, name: str
) -> None:
    """Its parameters moved at random, so that every one of them matters."""
    prepare(tmp_path)
    base, batch = Checkpoint.open(models / family), batch_of(models / family, tmp_path)
    model = load_model(base, SILENT, sees=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = says(model.eval(), batch)
    job = FinetuneJob.model_validate({**JOB, "adapter": adapter_of(name)})
    samples = samples_of(models / family, tmp_path, 2)
    adapted = attach(model, base, job, Surroundings(10, samples[0], Collator(0, extras=samples[1].extras), tmp_path))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in adapted.model.parameters():
            if one.requires_grad:
                one.add_(0.05 * torch.randn(one.shape, generator=generator))
    trained = says(adapted.model.eval(), batch)
    assert float((trained - plain).abs().max()) > 1e-4
    changed, far = fold(adapted, lambda model: model(**batch, use_cache=False).logits)
    assert far < 1e-5
    after = {**before, **changed}
    assert after.keys() == before.keys()
    parts = Parts(list(before), base.config)
    assert {parts.of(key).partition("[")[0] for key in changed if not changed[key].equal(before[key])} == {"llm.layers"}
    dense = load_model(base, SILENT, sees=True)
    dense.load_state_dict(after)
    assert float((says(dense.eval(), batch) - trained).abs().max()) < 1e-5


ATTACHED = [
    ("llava-onevision", "prompt"), ("paligemma", "prompt"), ("qwen2.5-vl", "p-tuning"), ("smolvlm", "prefix"),
    ("paligemma", "prefix"), ("internvl", "conditioned"), ("qwen2.5-vl", "bottleneck"), ("qwen2.5-vl", "visual-prompt"),
    ("smolvlm", "xlora"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), ATTACHED)
def test_what_cannot_be_folded_is_attached_again_and_scored(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str
) -> None:
    """The saved folder says of images what the trained model said in memory; `evaluate` scores and asks it so."""
    base = models / family
    if name == "xlora":
        for seed, out in enumerate(("first", "second")):
            tune(base, tmp_path, out, adapter=adapter_of("lora", keep=True), seed=seed, **SHORT)
    trained: list[torch.Tensor] = []
    plain = saving.save_adapter

    def remembering(adapted: Any, folder: Path) -> None:
        trained.append(says(adapted.model.eval(), batch_of(base, tmp_path)))
        plain(adapted, folder)

    monkeypatch.setattr(saving, "save_adapter", remembering)
    tune(base, tmp_path, adapter=adapter_of(name), **{**SHORT, "learning_rate": 0.1, "max_steps": 6})
    batch = batch_of(base, tmp_path)
    found = attach_saved(load(base), tmp_path / "out")
    assert float((says(found, batch) - trained[0]).abs().max()) < 1e-6
    assert float((trained[0] - says(load(base), batch)).abs().max()) > 1e-3

    (tmp_path / "suite.yaml").write_text(SUITE)
    asked = [{"q": f"Is {n} good?", "a": n % 2, "w": "yes", "picture": f"pictures/{n}.png"} for n in (1, 2)]
    write(tmp_path / "asked.jsonl", asked)
    over = f"over={base}+{tmp_path / 'out'}"
    results = evaluate([f"alone={tmp_path / 'out'}", over], suite=tmp_path / "suite.yaml", base=base, cache=False)
    likely = {model: scores["seen"].details["logprobs"] for model, scores in results.scores.items()}
    assert likely["alone"] == likely["over"]
    assert not np.allclose(likely["alone"], likely["base"], atol=1e-3)
    one = batch_of(base, tmp_path, 1)
    answers = found.generate(**one, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answers[0, -3:].tolist() == greedy(found, one, 3)


def greedy(model: Any, batch: dict[str, torch.Tensor], count: int) -> list[int]:
    """The likeliest tokens one after the other, each by a pass of its own."""
    said: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, -1]
        logits[model.generation_config.eos_token_id] = -torch.inf
        said.append(int(logits.argmax()))
        following = {"input_ids": said[-1], "attention_mask": 1, "token_type_ids": 1, "mm_token_type_ids": 0}
        for name in batch.keys() & following.keys():
            batch = {**batch, name: torch.nn.functional.pad(batch[name], (0, 1), value=following[name])}
    return said


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "internvl"])
def test_what_an_adapter_trains_is_reckoned_from_headers(
    models: Path, tiny_llama: Path, tmp_path: Path, family: str
) -> None:
    path = tiny_llama if family == "llama" else models / family
    base = Checkpoint.open(path)
    absent = {"xlora", "corda", "visual-prompt" if family == "llama" else "llama-adapter"}
    for name in FAMILIES.keys() - absent:
        job = FinetuneJob.model_validate({"data": "x", "adapter": adapter_of(name)})
        model = load_model(base, SILENT, sees=family != "llama")
        adapted = attach(model, base, job, Surroundings(10, [], None, tmp_path))
        count = sum(one.numel() for one in adapted.model.parameters() if one.requires_grad)
        assert estimate(job, base, device="cpu", longest=8).parts["gradients"] == 4 * count, name
