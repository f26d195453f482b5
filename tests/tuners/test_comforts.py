"""What a person sees of a run: answers at every evaluation, a picture of the losses, event files, time left."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stopping import StopsAt
from tuning import Listener, sha256, tune, write

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners import FinetuneReport, optimizers
from ktmerge.tuners.callbacks import LogCallback, Rhythm
from ktmerge.tuners.machine import less_memory

Tuned = tuple[Path, FinetuneReport, Listener]


def test_the_model_answers_at_every_evaluation(tuned: Tuned) -> None:
    out, report, listener = tuned
    samples = report.record["samples"]
    assert [one["step"] for one in samples] == sorted([0, 4, 8, 9] * 4)
    assert {one["set"] for one in samples} == {"upstream", "downstream"}
    first = next(one for one in samples if one["set"] == "downstream")
    assert first["asked"] == "Is 0 good?"
    assert first["expected"] == " no"
    assert json.loads((out / "ktmerge-run.json").read_text())["samples"] == samples
    assert any(note.startswith("  downstream: …Is 0 good? -> ") for note in listener.notes)


def test_answers_are_the_most_likely_tokens(tiny_llama: Path) -> None:
    """Against a loop of one's own over the whole text."""
    import torch
    from transformers import AutoModelForCausalLM

    from ktmerge.tuners.speaking import Prompt, Speaker

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompts = [Prompt("a", [5, 6, 7], [8, 9]), Prompt("b", [20, 21], [3])]
    state = torch.get_rng_state()
    model.train()
    found = Speaker(prompts, None, [2], Path("-"), Listener()).answers(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    for prompt, said in zip(prompts, found, strict=True):
        ids = list(prompt.asked)
        for _ in range(len(prompt.expected) + 8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert said == ids[len(prompt.asked) :]
    assert list(map(len, Speaker(prompts, None, [2], Path("-"), Listener(), room=4).answers(model))) == [1, 2]


@pytest.mark.slow
def test_line_separators_of_unicode_end_no_line_of_the_log(tiny_llama: Path, tmp_path: Path) -> None:
    asked = "one\u2028two\x85three\u2029four"
    write(tmp_path / "odd.jsonl", [{"prompt": asked, "completion": " \u2028yes"}])
    report = tune(tiny_llama, tmp_path, eval_downstream="odd.jsonl", max_steps=2, show_samples=1)
    assert {one["asked"] for one in report.record["samples"]} == {asked}
    lines = (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert next(one["asked"] for line in lines for one in json.loads(line).get("samples", [])) == asked


def test_the_losses_are_drawn(tuned: Tuned) -> None:
    picture = (tuned[0] / "ktmerge-losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000


def test_the_time_left_is_told(tmp_path: Path) -> None:
    listener, clock = Listener(), iter([100.0, 130.0, 130.0])
    rhythm = Rhythm(total=400, log_every=1, eval_every=10, save_every=None, evaluates=True)
    log = LogCallback(tmp_path / "log", rhythm, listener, listener, lambda: next(clock))
    log.on_step_begin(None, SimpleNamespace(global_step=100), None)
    log.on_log(None, SimpleNamespace(global_step=110), None, logs={"eval_upstream_loss": 2.0})
    assert listener.notes == ["step 110/400: loss upstream 2.0000; 14 min 30 s left"]


def test_the_three_settings_are_those_that_help() -> None:
    def told(device: str = "cpu", **settings: Any) -> str:
        return less_memory(FinetuneJob.model_validate({"data": ["x"], **settings}), 90, device)

    assert told(batch_size=6, gradient_accumulation=2).startswith(
        "Set batch_size=3 and gradient_accumulation=4 (same result, less memory), activation_checkpointing=true, "
        "or a max_length below 90"
    )
    assert "batch_size=1 and gradient_accumulation=5" in told(batch_size=5)
    other = told("cuda", batch_size=1, activation_checkpointing=True)
    assert "batch_size" not in other
    assert "offload_optimizer=true, or optimizer=adafactor" in other


def test_tensorboard_needs_its_package(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ktmerge\[tensorboard\]'"):
        tune(tiny_llama, tmp_path, tensorboard=True)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_events_are_those_of_the_log_even_after_a_stop(tiny_llama: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"eval_upstream": "chats.jsonl", "eval_every": 3, "tensorboard": True}
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **settings, progress=StopsAt(4))
    assert list((tmp_path / "out.partial/tensorboard").iterdir())
    tune(tiny_llama, tmp_path, **settings, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    found = EventAccumulator(str(tmp_path / "out"))
    found.Reload()
    for key, name in (("loss", "training/loss"), ("eval_upstream_loss", "evaluation/upstream_loss")):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if key in line]
        assert [(event.step, event.value) for event in found.Scalars(name)] == expected


class RunsOut:
    """A model's forward pass that runs out of memory once so many passes are done."""

    def __init__(self, passes: int, error: Exception) -> None:
        self._left, self._error = passes, error

    def __call__(self, *_: Any, **__: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise self._error


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_a_run_without_memory_keeps_its_last_step_and_goes_on_with_less(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """With dropout, whose random numbers the failed step has drawn already."""
    from ktmerge.tuners import loss, trainer

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    tune(base, tmp_path, "whole")
    real, runs_out = loss.answer_loss, RunsOut(5, error)

    def failing(*given: Any) -> Any:
        found = real(*given)
        runs_out()
        return found

    listener = Listener()
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "answer_loss", failing)
        with pytest.raises(KtmergeError, match=r"out of memory while fine-tuning\. Set batch_size=2 and gradient_acc"):
            tune(base, tmp_path, progress=listener)
    assert listener.notes[-1] == "kept the state after step 5 of 9; go on with --resume."
    shutil.copytree(tmp_path / "out.partial", tmp_path / "less.partial")
    tune(base, tmp_path, resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
    tune(base, tmp_path, "less", batch_size=2, gradient_accumulation=2, activation_checkpointing=True, resume=True)
    assert json.loads((tmp_path / "less/ktmerge-run.json").read_text())["run"]["steps"] == 9


@pytest.mark.parametrize(
    ("run", "export", "shown"),
    [
        ({}, "average", "2.0000 -> 4.0000"),
        ({"stopped_at": 4, "result_of_step": 2}, "average", "2.0000 -> 3.0000"),
        ({"average": {"losses": {"upstream": 2.5}}}, "both", "2.0000 -> 2.5000"),
        ({"average": {"losses": {"upstream": 2.5}}}, "last", "2.0000 -> 4.0000"),
    ],
)
def test_the_loss_that_is_told_is_that_of_what_was_saved(
    tuned: Tuned, run: dict[str, Any], export: str, shown: str
) -> None:
    record = dict(tuned[1].record)
    evaluations = [{"step": step, "upstream": loss} for step, loss in ((0, 2.0), (2, 3.0), (4, 4.0))]
    record |= {"run": record["run"] | run, "job": record["job"] | {"export": export}}
    pairs = FinetuneReport(Path("out"), record | {"losses": record["losses"] | {"evaluations": evaluations}}).pairs()
    assert pairs["upstream loss"] == shown
    assert ("(result: step 2)" in pairs["steps"]) == ("result_of_step" in run)
