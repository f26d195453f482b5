"""The same training as trl's SFTTrainer, on the same data: loss by loss, weight by weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners import finetune

ROWS = [{"prompt": f"Is {n} good?", "completion": " yes" * (1 + n % 5) if n % 2 else " no"} for n in range(16)]
STEPS = 5


def by_trl(base: Path, folder: Path) -> tuple[list[float], dict[str, Any]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(ROWS),
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        seed=42,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.slow
def test_prompt_completion_like_trl(tiny_llama: Path, tmp_path: Path) -> None:
    """Every batch is the whole set, so the order of samples is no difference."""
    from safetensors.torch import load_file

    pytest.importorskip("trl")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    job = FinetuneJob(
        data=["a.jsonl"], batch_size=len(ROWS), max_steps=STEPS, learning_rate=1e-3, warmup=0, precision="float32"
    )
    finetune(job, tiny_llama, tmp_path / "out", folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    expected, parameters = by_trl(tiny_llama, tmp_path)
    assert len(expected) == STEPS
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in found.items():
        assert (tensor - parameters[name]).abs().mean() < 1e-5, name
