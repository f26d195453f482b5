"""What stops a fine-tune, or is said before it starts: mistakes, existing outputs, a machine at its limits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuning import JOB, Listener, sha256, takes_masks, tune, write

from ktmerge import api
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.images import Image, ImageError
from ktmerge.tuners import finetune
from ktmerge.tuners.partial import differences
from ktmerge.tuners.report import inputs_of


def test_another_format_is_another_job(toy_pair: tuple[Path, Path]) -> None:
    """A file may hold the columns of two."""
    base = Checkpoint.open(toy_pair[0])
    plain, asked = (
        inputs_of(FinetuneJob.model_validate({**JOB, "format": one}), base, "", {}, {}) for one in ("auto", "alpaca")
    )
    assert differences(plain, asked) == ["format was None, now alpaca"]


def test_a_picture_that_no_file_can_be_called_is_told() -> None:
    with pytest.raises(ImageError, match="names no file"):
        Image(Path("\ud800.png")).content()


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
    refused("512 vectors before the text leave no room", data=["long.jsonl"], adapter={"name": "prompt", "tokens": 512})
    refused(r"long\.jsonl: all 3 samples", eval_upstream="long.jsonl", max_length=16)
    with pytest.raises(UsageError, match="is one of the inputs"):
        finetune(FinetuneJob.model_validate(JOB), tiny_llama, tiny_llama, folder=tmp_path, overwrite=True)
    (tmp_path / "kept").mkdir()
    write(tmp_path / "kept" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "kept" / "model.safetensors").touch()
    kept = FinetuneJob.model_validate({**JOB, "data": ["kept/train.jsonl"]})
    with pytest.raises(UsageError, match=r"kept: contains the input .*train\.jsonl"):
        finetune(kept, tiny_llama, tmp_path / "kept", folder=tmp_path, overwrite=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        finetune(FinetuneJob.model_validate(JOB), tmp_path / "empty", tmp_path / "out", folder=tmp_path)


def test_several_processes_need_a_launcher(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="WORLD_SIZE is 2, and RANK"):
        tune(tiny_llama, tmp_path)


@pytest.mark.slow
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


@takes_masks
def test_a_diverging_run_says_so(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktmerge.tuners import trainer

    plain = trainer.answer_loss

    def diverging(model: Any, inputs: Any) -> Any:
        return plain(model, inputs) * float("nan")

    monkeypatch.setattr(trainer, "answer_loss", diverging)
    monkeypatch.setattr("ktmerge.tuners.assembly.projects_faithfully", lambda *_: True)
    with pytest.raises(KtmergeError, match="training diverged: loss is nan at step 1"):
        tune(tiny_llama, tmp_path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), r"out of memory while fine-tuning\. Set batch_size=2 and gradient_accumulation=2"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "activation_checkpointing=true, or a max_length below",
        ),
        (OSError(28, "No space left on device"), r"cannot be written .*No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 293504 vs 293392"),
            r"cannot be written \(a file could not be written whole\); free some space and go on with --resume",
        ),
    ],
)
def test_a_machine_at_its_limits_is_answered(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    from ktmerge.tuners import trainer

    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(trainer, "answer_loss", failing)
    monkeypatch.setattr("ktmerge.tuners.assembly.projects_faithfully", lambda *_: True)
    with pytest.raises(KtmergeError, match=expected) as caught:
        tune(tiny_llama, tmp_path)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said_beforehand(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktmerge.tuners.announcement.memory_available", lambda device: 1e6)
    listener = Listener()
    tune(tiny_llama, tmp_path, max_steps=1, progress=listener)
    assert any("may not fit into memory" in note and "0.0 GB are free" in note for note in listener.notes)


def test_too_little_disk_is_said_beforehand(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktmerge.tuners.announcement.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr("ktmerge.checkpoints.staging.Staging.require_space", lambda *_: None)
    listener = Listener()
    tune(tiny_llama, tmp_path, max_steps=1, progress=listener)
    assert any("the disk may run full" in note for note in listener.notes)


def test_a_disk_that_is_full_at_the_end_costs_no_training(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ktmerge.checkpoints.staging.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(KtmergeError, match=r"but only 0.00 GB are free.*: --resume goes on from them"):
            tune(tiny_llama, tmp_path, max_steps=1)
    listener = Listener()
    tune(tiny_llama, tmp_path, max_steps=1, resume=True, progress=listener)
    assert not any("training" in note for note in listener.notes)


def test_experts_are_chosen_of_a_recipe() -> None:
    with pytest.raises(UsageError, match="--only chooses experts of a recipe"):
        api.finetune_jobs(None, base="base", data=["a.jsonl"], out=Path("out"), only=["spam"])
