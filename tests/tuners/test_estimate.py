"""The estimate of memory: held against the peaks of real runs, and against what should and should not change it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tuning import write

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.estimate import MARGIN, Estimate, estimate

RUN = """
import json, resource, sys
from pathlib import Path
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners import finetune
job, base, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
finetune(FinetuneJob.model_validate(job), base, folder / "out", folder=folder, overwrite=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def of(base: Path, processes: int = 1, device: Any = "cpu", longest: int | None = None, **settings: Any) -> Estimate:
    job = FinetuneJob.model_validate({"data": ["x"], "batch_size": 16, "precision": "float32", **settings})
    return estimate(job, Checkpoint.open(base), processes, device=device, longest=longest)


def test_what_is_kept_of_every_parameter_is_counted(tiny_llama: Path) -> None:
    import torch  # the oracle: what fp32 copies of the model take

    count = sum(info.numel for info in Checkpoint.open(tiny_llama).tensors.values())
    fp32 = torch.zeros((), dtype=torch.float32).element_size()
    parts = of(tiny_llama).parts
    assert parts["weights"] == parts["gradients"] == fp32 * count
    assert parts["optimizer"] == 2 * fp32 * count
    last = of(tiny_llama, train="last:1").parts
    assert last["weights"] == parts["weights"]
    assert last["gradients"] < parts["gradients"] / 2
    assert last["activations"] == pytest.approx(parts["activations"] / 2)  # one of two layers, nothing below it
    tied = of(tiny_llama, train="head").parts
    assert tied["gradients"] == of(tiny_llama, train="embed").parts["gradients"] > 0
    assert of(tiny_llama, optimizer="sgd").parts.get("optimizer", 0) == 0
    assert of(tiny_llama, average="ema").parts["kept of the base, averages"] == fp32 * count


def test_settings_that_save_memory_do(tiny_llama: Path) -> None:
    now = of(tiny_llama, device="cuda", longest=512)
    assert of(tiny_llama, device="cuda", longest=512, activation_checkpointing=True).total < now.total
    assert of(tiny_llama, device="cuda", longest=512, precision="bfloat16").total < now.total
    assert of(tiny_llama, device="cuda", longest=256).total < now.total
    assert (
        of(tiny_llama, device="cuda", longest=512, batch_size=8).total
        == now.alternatives["batch_size=8, gradient_accumulation=2"]
    )
    assert all(total < now.total for total in now.alternatives.values())
    assert "train=last:4" not in now.alternatives  # it has two layers
    # on a CPU batches are split
    assert of(tiny_llama, longest=512).total == of(tiny_llama, longest=512, batch_size=1).total


def test_processes_share_what_is_sharded(tiny_llama: Path) -> None:
    one, four = of(tiny_llama, 1, "cuda"), of(tiny_llama, 4, "cuda")
    for what in ("weights", "gradients", "optimizer"):
        assert four.parts[what] == one.parts[what] / 4
    assert four.parts["activations"] == one.parts["activations"] / 4  # each takes a quarter of a step
    assert four.parts["put together of shards"] > 0
    with pytest.raises(UsageError, match="3 processes cannot share"):
        of(tiny_llama, 3)


@pytest.mark.slow
def test_the_command_tells_it_without_reading_weights(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    stored = base / "model.safetensors"
    size = stored.stat().st_size
    header = stored.read_bytes()[: 8 + int.from_bytes(stored.read_bytes()[:8], "little")]
    stored.write_bytes(header)
    os.truncate(stored, size)  # a file of nothing but its header
    command = [
        sys.executable,
        "-m",
        "ktmerge",
        "finetune",
        "--base",
        str(base),
        "--data",
        "train.jsonl",
        "--out",
        "out",
    ]
    done = subprocess.run([*command, "--estimate", "--processes", "2", "--json"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert told["total"] == pytest.approx(sum(told["bytes"].values()), abs=len(told["bytes"]))
    assert (told["processes"], told["device"], told["precision"]) == (2, "cuda", "bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"activation_checkpointing": True}, {"train": "last:2", "average": "ema"}], ids=str
)
def test_peaks_of_real_runs_are_within_the_margin(tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A model of 28M parameters, samples of full length, nearly all tokens trained."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = tokenizer.decode(tokenizer(" yes no" * 400)["input_ids"][:500])
    write(tmp_path / "train.jsonl", [{"prompt": "a", "completion": text}] * 4)
    job = {"data": ["train.jsonl"], "batch_size": 4, "max_steps": 2, "precision": "float32", **settings}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(job), tmp_path / "base", tmp_path],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = estimate(FinetuneJob.model_validate(job), Checkpoint.open(tmp_path / "base"), device="cpu", longest=502)
    assert found.total == pytest.approx(float(done.stdout), rel=MARGIN)
