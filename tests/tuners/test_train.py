"""Fine-tuning a tiny model: what changes, what is saved, what is logged, the same bytes twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tuning import ROWS, Listener, sha256, tune, weights, write

from ktmerge.checkpoints.checkpoint import Checkpoint


def test_the_output_is_the_base_with_other_values(tuned: Any, tiny_llama: Path) -> None:
    out, _, _ = tuned
    base, found = Checkpoint.open(tiny_llama), Checkpoint.open(out)
    assert list(found.tensors) == list(base.tensors)
    assert "lm_head.weight" not in found.tensors
    for name, info in base.tensors.items():
        assert found.tensors[name].shape == info.shape
        assert found.tensors[name].dtype == "F32"
    for file in base.other_files:
        if file != "config.json":
            assert (out / file).read_bytes() == (tiny_llama / file).read_bytes(), file
    assert found.config == {**base.config, "dtype": "float32"}
    assert not (out.parent / "out.partial").exists()


def test_every_parameter_moved(tuned: Any, tiny_llama: Path) -> None:
    out, _, _ = tuned
    before, after = weights(tiny_llama), weights(out)
    for name in before:
        assert not before[name].float().equal(after[name]), name


def test_transformers_loads_it_whole(tuned: Any) -> None:
    from transformers import AutoModelForCausalLM

    out, _, _ = tuned
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(model.dtype) == "torch.float32"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_losses_are_logged_from_step_0_on(tuned: Any) -> None:
    out, report, listener = tuned
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_upstream_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8, 9]
    assert all("eval_downstream_loss" in line for line in evaluated)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 10))
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert report.losses["first"] == trained[0]["loss"]
    assert report.losses["evaluations"][0]["upstream"] == evaluated[0]["eval_upstream_loss"]
    assert listener.tasks["fine-tuning out"] == 9
    assert any(note.startswith("step 9/9: loss training") and "upstream" in note for note in listener.notes)


def test_the_evaluated_loss_is_per_trained_token_of_the_saved_model(tuned: Any) -> None:
    """Computed from the published checkpoint, sample by sample, without padding or the Trainer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, report, _ = tuned
    model = AutoModelForCausalLM.from_pretrained(out).double()
    tokenizer = AutoTokenizer.from_pretrained(out)
    total, count = 0.0, 0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(prompt), len(ids)):
            total -= float(logs[position - 1, ids[position]])
            count += 1
    assert report.losses["evaluations"][-1]["downstream"] == pytest.approx(total / count, rel=1e-5)


def test_the_record_says_how_it_came_about(tuned: Any, tiny_llama: Path) -> None:
    out, report, _ = tuned
    text = (out / "ktmerge-run.json").read_text()
    record = json.loads(text)
    assert record == report.record
    assert str(tiny_llama.parent) not in text
    assert str(out.parent) not in text
    assert record["job"]["learning_rate"] == 1e-3
    assert record["base"] == tiny_llama.name
    assert record["inputs"]["base"]["header"] == Checkpoint.open(tiny_llama).header_digest()
    digest = hashlib.sha256((out.parent / "train.jsonl").read_bytes()).hexdigest()
    assert record["inputs"]["training data"] == [digest]
    assert record["counts"]["train"]["samples"] == len(ROWS)
    assert record["run"]["steps"] == 9
    assert {"python", "torch", "transformers"} <= record["versions"].keys()
    assert report.pairs()["tuned model"] == str(out)
    assert report.to_json()["out"] == str(out)


@pytest.mark.slow
def test_the_same_job_gives_the_same_bytes(tuned: Any, tiny_llama: Path, tmp_path: Path) -> None:
    out, _, _ = tuned
    tune(tiny_llama, tmp_path, eval_upstream="chats.jsonl", eval_downstream="train.jsonl", eval_every=4)
    assert sha256(tmp_path / "out") == sha256(out)
    # looking more or less often changes nothing, another seed does
    tune(tiny_llama, tmp_path, "quiet", log_every=5, save_every=3)
    assert sha256(tmp_path / "quiet") == sha256(out)
    tune(tiny_llama, tmp_path, "other", seed=7)
    assert sha256(tmp_path / "other") != sha256(out)


@pytest.mark.slow
def test_accumulation_gives_the_gradient_of_the_whole_batch(tuned: Any, tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    tune(tiny_llama, tmp_path, "whole", max_steps=2, warmup=0, learning_rate=1e-4)
    tune(
        tiny_llama, tmp_path, "split", max_steps=2, warmup=0, learning_rate=1e-4, batch_size=2, gradient_accumulation=2
    )
    whole, split, base = weights(tmp_path / "whole"), weights(tmp_path / "split"), weights(tiny_llama)
    for name in whole:
        moved = (whole[name] - base[name].float()).abs().max()
        assert moved > 1e-4
        close = (whole[name] - split[name]).abs() < 1e-5
        assert close.float().mean() > 0.99, name
    assert torch.isfinite(whole["model.norm.weight"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tag"), [("base", "BF16"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_type_of_the_saved_weights(tuned: Any, tiny_llama: Path, tmp_path: Path, dtype: str, tag: str) -> None:
    import torch

    out, _, _ = tuned
    tune(tiny_llama, tmp_path, save_dtype=dtype)
    found = Checkpoint.open(tmp_path / "out")
    assert {info.dtype for info in found.tensors.values()} == {tag}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == ("bfloat16" if dtype == "base" else dtype)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16}[tag]
    exact = weights(out)
    assert all(tensor.equal(exact[name].to(kind)) for name, tensor in weights(tmp_path / "out").items())


@pytest.mark.slow
def test_bfloat16_activation_checkpointing_and_constant_rate_run(tiny_llama: Path, tmp_path: Path) -> None:
    report = tune(
        tiny_llama, tmp_path, max_steps=2, precision="bfloat16", activation_checkpointing=True, scheduler="constant"
    )
    assert report.record["run"]["precision"] == "bfloat16"


def test_one_step_trains(tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, max_steps=1, warmup=0.5)
    before, after = weights(tiny_llama), weights(tmp_path / "out")
    assert not before["model.norm.weight"].float().equal(after["model.norm.weight"])


def test_long_samples_are_left_out_and_said(tiny_llama: Path, tmp_path: Path) -> None:
    listener = Listener()
    write(tmp_path / "mixed.jsonl", [*ROWS, {"prompt": "long", "completion": " long" * 100}])
    report = tune(tiny_llama, tmp_path, data=["mixed.jsonl"], max_length=64, max_steps=1, progress=listener)
    assert report.record["counts"]["train"]["dropped"] == 1
    assert report.record["counts"]["train"]["samples"] == len(ROWS)
    assert any("1 of 31 samples are longer than 64 tokens" in note for note in listener.notes)
