"""Fine-tuning a tiny model: what changes, what is saved, what is logged, the same bytes twice, and after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ktmerge.checkpoints import Checkpoint
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners import FinetuneReport, finetune

ROWS = [{"prompt": f"Is {n} good?", "completion": " yes" * (1 + n % 3) if n % 2 else " no"} for n in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"{n}"}]} for n in range(6)
]
JOB: dict[str, Any] = {
    "data": ["train.jsonl"],
    "max_steps": 9,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "float32",
}


class Listener:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: dict[str, float] = {}
        self._name = ""

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Any]:
        self.tasks[description] = 0.0
        outer, self._name = self._name, description
        yield self
        self._name = outer

    def advance(self, amount: float = 1) -> None:
        self.tasks[self._name] += amount


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tune(base: Path, folder: Path, out: str = "out", /, **settings: Any) -> FinetuneReport:
    """Write the data beside the output, and run."""
    write(folder / "train.jsonl", ROWS)
    write(folder / "chats.jsonl", CHATS)
    flags = {name: settings.pop(name) for name in ("overwrite", "resume", "progress") if name in settings}
    return finetune(FinetuneJob.model_validate({**JOB, **settings}), base, folder / out, folder=folder, **flags)


def sha256(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def weights(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinetuneReport, Listener]:
    """One fine-tune with both evaluation sets, looked at by many tests."""
    folder = tmp_path_factory.mktemp("tuned")
    listener = Listener()
    report = tune(
        tiny_llama, folder, eval_upstream="chats.jsonl", eval_downstream="train.jsonl", eval_every=4, progress=listener
    )
    return folder / "out", report, listener


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


def test_the_same_job_gives_the_same_bytes(tuned: Any, tiny_llama: Path, tmp_path: Path) -> None:
    out, _, _ = tuned
    tune(tiny_llama, tmp_path, eval_upstream="chats.jsonl", eval_downstream="train.jsonl", eval_every=4)
    assert sha256(tmp_path / "out") == sha256(out)
    # looking more or less often changes nothing, another seed does
    tune(tiny_llama, tmp_path, "quiet", log_every=5, save_every=3)
    assert sha256(tmp_path / "quiet") == sha256(out)
    tune(tiny_llama, tmp_path, "other", seed=7)
    assert sha256(tmp_path / "other") != sha256(out)


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


def test_mistakes_are_found_before_anything_is_made(tiny_llama: Path, tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(UsageError, match=message):
            tune(tiny_llama, tmp_path, **settings)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    refused(r"trainn\.jsonl: no such file\. Did you mean 'train\.jsonl'", data=["trainn.jsonl"])
    with pytest.raises(UsageError) as caught:
        tune(tiny_llama, tmp_path, data=["x.jsonl"], eval_upstream="y.jsonl")
    assert "x.jsonl" in str(caught.value)
    assert "y.jsonl" in str(caught.value)
    write(tmp_path / "long.jsonl", [{"prompt": "long", "completion": " long" * 9}] * 3)
    refused("all 3 samples are longer than 8 tokens", data=["long.jsonl"], max_length=8)
    refused(r"long\.jsonl: all 3 samples", eval_upstream="long.jsonl", max_length=16)
    with pytest.raises(UsageError, match="is one of the inputs"):
        finetune(FinetuneJob.model_validate(JOB), tiny_llama, tiny_llama, folder=tmp_path, overwrite=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        finetune(FinetuneJob.model_validate(JOB), tmp_path / "empty", tmp_path / "out", folder=tmp_path)


def test_several_processes_are_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        tune(tiny_llama, tmp_path)


def test_an_existing_output_is_replaced_only_when_asked(tuned: Any, tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, max_steps=1)
    before = sha256(tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        tune(tiny_llama, tmp_path)
    assert sha256(tmp_path / "out") == before
    with pytest.raises(UsageError, match="made with other settings: max_steps was 1, now 9"):
        tune(tiny_llama, tmp_path, resume=True)
    listener = Listener()
    kept = tune(tiny_llama, tmp_path, max_steps=1, resume=True, progress=listener)
    assert "already what the job asks for" in listener.notes[-1]
    assert kept.record["run"]["steps"] == 1
    tune(tiny_llama, tmp_path, overwrite=True)
    assert sha256(tmp_path / "out") == sha256(tuned[0])


def test_a_diverging_run_says_so(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktmerge.tuners import trainer

    plain = trainer.answer_loss

    def diverging(model: Any, inputs: Any) -> Any:
        return plain(model, inputs) * float("nan")

    monkeypatch.setattr(trainer, "answer_loss", diverging)
    monkeypatch.setattr("ktmerge.tuners.run.projects_faithfully", lambda *_: True)
    with pytest.raises(KtmergeError, match="training diverged: loss is nan at step 1"):
        tune(tiny_llama, tmp_path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), r"out of memory while fine-tuning\. Set batch_size=2 and gradient_accumulation=2"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "activation_checkpointing=true, or a max_length below",
        ),
        (OSError(28, "No space left on device"), r"cannot be written .*No space left on device"),
    ],
)
def test_a_machine_at_its_limits_is_answered(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    from ktmerge.tuners import trainer

    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(trainer, "answer_loss", failing)
    monkeypatch.setattr("ktmerge.tuners.run.projects_faithfully", lambda *_: True)
    with pytest.raises(KtmergeError, match=expected) as caught:
        tune(tiny_llama, tmp_path)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said_beforehand(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktmerge.tuners.run.memory_available", lambda device: 1e6)
    listener = Listener()
    tune(tiny_llama, tmp_path, max_steps=1, progress=listener)
    assert any("may not fit into memory" in note and "0.0 GB are free" in note for note in listener.notes)


def test_too_little_disk_is_said_beforehand(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("ktmerge.tuners.run.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr("ktmerge.checkpoints.staging.Staging.require_space", lambda *_: None)
    listener = Listener()
    tune(tiny_llama, tmp_path, max_steps=1, progress=listener)
    assert any("the disk may run full" in note for note in listener.notes)


# --- stopping and going on --------------------------------------------------------------------------------------------


class StopsAt(Listener):
    """Sends the process a Ctrl-C when a step is done, as a person would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def advance(self, amount: float = 1) -> None:
        super().advance(amount)
        if self._name.startswith("fine-tuning") and self.tasks[self._name] == self._step:
            os.kill(os.getpid(), signal.SIGINT)


LONG: dict[str, Any] = {"max_steps": 18, "eval_upstream": "chats.jsonl", "eval_every": 5}


@pytest.fixture(scope="module")
def unbroken(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 samples in batches of 4: epochs of 8 steps, the last batch smaller; 18 steps go into the third epoch."""
    folder = tmp_path_factory.mktemp("unbroken")
    tune(tiny_llama, folder, **LONG)
    return folder / "out"


@pytest.mark.parametrize("step", [3, 8, 10, 18])
def test_ctrl_c_saves_at_once_and_resumes_to_the_same_bytes(
    unbroken: Path, tiny_llama: Path, tmp_path: Path, step: int
) -> None:
    """In the middle of an epoch, at its end, at an evaluation, at the last step."""
    listener = StopsAt(step)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **LONG, progress=listener)
    assert listener.notes[-1] == f"stopped after step {step} of 18; go on with --resume."
    assert not (tmp_path / "out").exists()
    kept = "final" if step == 18 else f"checkpoint-{step}"
    assert (tmp_path / "out.partial" / kept / "complete.json").exists()
    with pytest.raises(UsageError, match="add --resume to go on with it, or --overwrite"):
        tune(tiny_llama, tmp_path, **LONG)
    with pytest.raises(UsageError, match=r"started with other settings: learning_rate was 0\.001, now 0\.1"):
        tune(tiny_llama, tmp_path, **LONG, learning_rate=0.1, resume=True)
    tune(tiny_llama, tmp_path, **LONG, resume=True)
    assert sha256(tmp_path / "out") == sha256(unbroken)
    assert not (tmp_path / "out.partial").exists()
    assert log_of(tmp_path / "out") == log_of(unbroken)


def log_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_other_data_or_base_cannot_be_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **LONG, progress=StopsAt(3))
    write(tmp_path / "other.jsonl", ROWS[1:])
    with pytest.raises(UsageError, match="another training data"):
        tune(tiny_llama, tmp_path, **LONG, data=["other.jsonl"], resume=True)
    assert (tmp_path / "out.partial/checkpoint-3").exists()
    tune(tiny_llama, tmp_path, max_steps=1, overwrite=True)
    assert not (tmp_path / "out.partial").exists()


def test_a_damaged_checkpoint_costs_only_its_steps(unbroken: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **LONG, save_every=4, progress=StopsAt(10))
    newest = tmp_path / "out.partial/checkpoint-10"
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[: len(content) // 2])
    listener = Listener()
    tune(tiny_llama, tmp_path, **LONG, resume=True, progress=listener)
    assert any("going on after step 8 of 18" in note for note in listener.notes)
    assert sha256(tmp_path / "out") == sha256(unbroken)


def test_resume_without_anything_to_resume_starts(unbroken: Path, tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, **LONG, resume=True)
    assert sha256(tmp_path / "out") == sha256(unbroken)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners import callbacks, finetune, partial

job, base, folder, moment = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
if moment == "while saving":
    seal = partial.Partial.seal
    def dying(self, path, step, seconds):
        if step >= 8:
            (path / "optimizer.pt").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        seal(self, path, step, seconds)
    partial.Partial.seal = dying
elif moment == "while publishing":
    from ktmerge.checkpoints import Writer
    Writer.copy_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
finetune(FinetuneJob.model_validate(job), base, folder / "out", folder=folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["any time", "while saving", "while publishing"])
def test_a_killed_run_resumes_to_the_same_bytes(unbroken: Path, tiny_llama: Path, tmp_path: Path, moment: str) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "chats.jsonl", CHATS)
    settings = json.dumps({**JOB, **LONG, "save_every": 2})
    process = subprocess.Popen([sys.executable, "-c", KILLED, settings, tiny_llama, tmp_path, moment])
    log = tmp_path / "out.partial/log.jsonl"
    deadline = time.monotonic() + 120
    while moment == "any time" and process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count('"loss"') >= 5:
            process.kill()
        time.sleep(0.002)
    assert process.wait(120) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--resume"):
        tune(tiny_llama, tmp_path, **LONG)
    listener = Listener()
    tune(tiny_llama, tmp_path, **LONG, resume=True, progress=listener)
    assert sha256(tmp_path / "out") == sha256(unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "out", "train.jsonl"]
    going_on = [note for note in listener.notes if "going on after step" in note]
    assert bool(going_on) == (moment != "while publishing")


@pytest.mark.slow
def test_dropout_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """Random numbers are drawn in the forward pass, so their state must be restored at the right moment."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    tune(base, tmp_path, "whole", **LONG)
    for step in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            tune(base, tmp_path, **LONG, progress=StopsAt(step))
        tune(base, tmp_path, **LONG, resume=True)
        assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
