"""The same training as trl's SFTTrainer, on the same data: loss by loss, weight by weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners import finetune

ROWS = [{"prompt": f"Is {n} good?", "completion": " yes" * (1 + n % 5) if n % 2 else " no"} for n in range(16)]
STEPS = 5


def by_trl(base: Path, folder: Path, rows: list[dict[str, Any]], **more: Any) -> tuple[list[float], dict[str, Any]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
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
        **more,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": "good" * (1 + n % 4)},
            {"role": "user", "content": "Is it?"},
            {"role": "assistant", "content": "yes yes" if n % 3 else "no"},
        ]
    }
    for n in range(8)
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt-completion", "accumulated", "conversations"])
def test_like_trl(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """Every step takes the whole set, at once or in batches of unequal tokens, so that their order is no difference."""
    from safetensors.torch import load_file

    pytest.importorskip("trl")
    base, rows, more = tiny_llama, ROWS, {}
    if kind == "conversations":
        base, rows, more = tmp_path / "base", CHATS, {"assistant_only_loss": True}
        shutil.copytree(tiny_llama, base)
        (base / "chat_template.jinja").write_text(TEMPLATE)
    passes = 4 if kind == "accumulated" else 1
    size = len(rows) // passes
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = FinetuneJob(
        data=["a.jsonl"], batch_size=size, gradient_accumulation=passes, max_steps=STEPS, learning_rate=1e-3, warmup=0,
        precision="float32",
    )  # fmt: skip
    finetune(job, base, tmp_path / "out", folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    expected, parameters = by_trl(base, tmp_path, rows, **shape, **more)
    assert len(expected) == STEPS
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in found.items():
        assert (tensor - parameters[name]).abs().mean() < 1e-5, name
