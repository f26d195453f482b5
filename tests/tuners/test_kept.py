"""Fine-tunes of a tiny model that keep the base: what is trained on, what is saved, and the same bytes after a stop."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stopping import KILLED, StopsAt
from tuning import CHATS, JOB, ROWS, Listener, sha256, tune, weights, write

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.tuners.collate import Collator

EVERYTHING: dict[str, Any] = {
    "replay": ["chats.jsonl"],
    "replay_ratio": 0.5,
    "distill": 0.7,
    "l2_sp": 0.3,
    "average": "lawa",
    "lawa_every": 2,
    "lawa_window": 3,
    "export": "both",
    "select": "gradient",
    "density": 0.5,
    "every": 4,
    "max_steps": 12,
}
"""At once, so that one run shows that they do not stand in each other's way."""


def log_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def plain(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "seconds"}


@pytest.mark.slow
def test_everything_at_once_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    report = tune(tiny_llama, tmp_path, "whole", **EVERYTHING, eval_upstream="chats.jsonl")
    assert report.record["run"]["average"]["kind"] == "lawa"
    assert report.record["counts"]["replay"]["samples"] == len(CHATS)
    assert "replay data" in report.record["inputs"]
    line = [one for one in log_of(tmp_path / "whole") if "loss" in one][-1]
    assert {"pull", "distillation", "loss"} <= line.keys()
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **EVERYTHING, eval_upstream="chats.jsonl", progress=StopsAt(7))
    with pytest.raises(UsageError, match=r"replay_ratio was 0\.5, now 0\.25"):
        tune(tiny_llama, tmp_path, **{**EVERYTHING, "replay_ratio": 0.25}, eval_upstream="chats.jsonl", resume=True)
    tune(tiny_llama, tmp_path, **EVERYTHING, eval_upstream="chats.jsonl", resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
    assert sha256(tmp_path / "out-last") == sha256(tmp_path / "whole-last")
    assert sha256(tmp_path / "out") != sha256(tmp_path / "out-last")
    assert [plain(line) for line in log_of(tmp_path / "out")] == [plain(line) for line in log_of(tmp_path / "whole")]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UsageError, match="out-last: exists"):
        tune(tiny_llama, tmp_path, **EVERYTHING)


@pytest.mark.slow
def test_replay_is_counted_in_every_batch(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 samples in batches of 4 with one replayed: 10 batches an epoch."""
    batches: list[tuple[int, int]] = []
    plain = Collator.__call__

    def counting(self: Collator, samples: Any) -> Any:
        replayed = sum(sample.replayed for sample in samples)
        batches.append((len(samples) - replayed, replayed))
        return plain(self, samples)

    monkeypatch.setattr(Collator, "__call__", counting)
    report = tune(tiny_llama, tmp_path, replay="chats.jsonl", max_steps=None, epochs=2)
    assert report.record["run"]["steps"] == 20
    trained = [batch for batch in batches if sum(batch) > 1]  # before the first step a single sample is tried
    assert trained[:20] == [(3, 1)] * 20


@pytest.mark.slow
def test_distillation_starts_at_nothing_and_holds_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "warmup": 0, "scheduler": "constant", "train": "llm.layers+norm"}
    tune(tiny_llama, tmp_path, "plain", **settings)
    tune(tiny_llama, tmp_path, "held", **settings, distill=20.0)
    plain, held = log_of(tmp_path / "plain"), log_of(tmp_path / "held")
    assert held[0]["distillation"] == pytest.approx(0.0, abs=1e-6)
    assert held[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert held[-1]["distillation"] > 0
    base = weights(tiny_llama)

    def way(out: str) -> float:
        found = weights(tmp_path / out)
        return sum(float((found[name].float() - base[name].float()).square().sum()) for name in base)

    assert way("held") < way("plain")
    # on replayed samples only, without any among them: nothing is taught, and nothing changes
    tune(tiny_llama, tmp_path, "idle", **settings, distill=20.0, distill_on="downstream", replay="chats.jsonl")
    assert log_of(tmp_path / "idle")[-1]["distillation"] > 0


@pytest.mark.slow
def test_a_model_without_positions_to_keep_is_distilled_alike(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktmerge.tuners import assembly

    settings: dict[str, Any] = {"max_steps": 3, "distill": 2.0, "learning_rate": 1e-4}
    tune(tiny_llama, tmp_path, "lean", **settings)
    monkeypatch.setattr(assembly, "projects_faithfully", lambda *_: False)
    tune(tiny_llama, tmp_path, "plain", **settings)
    for lean, plain in zip(log_of(tmp_path / "lean"), log_of(tmp_path / "plain"), strict=True):
        assert plain["loss"] == pytest.approx(lean["loss"], rel=1e-4)
        assert plain["distillation"] == pytest.approx(lean["distillation"], rel=1e-2, abs=1e-6)


@pytest.mark.slow
def test_a_stopped_run_saves_the_last_evaluation_within_the_limit(tiny_llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scheduler": "constant", "warmup": 0, "eval_upstream": "chats.jsonl", "eval_every": 2}
    free = tune(tiny_llama, tmp_path, "free", **settings, max_steps=8)
    losses = {one["step"]: one["upstream"] for one in free.losses["evaluations"]}
    assert losses[8] > losses[4] > losses[0]
    listener = Listener()
    allowed = (losses[4] + losses[6]) / 2 - losses[0]
    held = tune(tiny_llama, tmp_path, "held", **settings, max_steps=8, stop_upstream=allowed, progress=listener)
    assert held.record["run"]["stopped_at"] == held.record["run"]["steps"] == 6
    assert held.record["run"]["result_of_step"] == 4
    assert any("the result is that of step 4" in note for note in listener.notes)
    tune(tiny_llama, tmp_path, "short", **settings, max_steps=4)
    assert sha256(tmp_path / "held") == sha256(tmp_path / "short")
    tune(tiny_llama, tmp_path, "never", **settings, max_steps=8, stop_upstream=100.0)
    assert sha256(tmp_path / "never") == sha256(tmp_path / "free")


@pytest.mark.slow
def test_a_run_that_was_over_is_over_when_it_goes_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed between the evaluation that stopped it and its result: no checkpoint of that step may be there."""
    settings: dict[str, Any] = {"scheduler": "constant", "warmup": 0, "eval_upstream": "chats.jsonl", "eval_every": 2,
                                "max_steps": 8, "stop_upstream": 1e-6, "save_every": 1}  # fmt: skip
    whole = tune(tiny_llama, tmp_path, "whole", **settings).record["run"]
    assert whole["stopped_at"] < 8

    def fails(*_: Any) -> None:
        raise KtmergeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("ktmerge.tuners.run.seal", fails)
        with pytest.raises(KtmergeError, match="full"):
            tune(tiny_llama, tmp_path, **settings)
    again = tune(tiny_llama, tmp_path, **settings, resume=True).record["run"]
    assert again["stopped_at"] == whole["stopped_at"]
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")


@pytest.mark.slow
def test_the_last_weights_beside_an_average_are_those_of_a_plain_run(tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, "plain")
    tune(tiny_llama, tmp_path, "out", average="ema", export="both")
    assert sha256(tmp_path / "out-last") == sha256(tmp_path / "plain")
    tune(tiny_llama, tmp_path, "last", average="ema", export="last")
    assert sha256(tmp_path / "last") == sha256(tmp_path / "plain")
    assert not (tmp_path / "last-last").exists()


@pytest.mark.slow
def test_ewc_takes_its_stiffness_from_statistics_of_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    from ktmerge.recipes.schema import Statistics
    from ktmerge.tuners.statistics.measure import measure

    write(tmp_path / "chats.jsonl", CHATS)
    for out, fisher in (("stats", "empirical"), ("bare", "none")):
        job = Statistics(data=["chats.jsonl"], fisher=fisher, tokens=8)  # type: ignore[arg-type]
        measure(job, tiny_llama, tmp_path / out, folder=tmp_path)
    tune(tiny_llama, tmp_path, "loose", l2_sp=5.0, max_steps=4)
    report = tune(tiny_llama, tmp_path, "stiff", l2_sp=5.0, fisher="stats", max_steps=4)
    assert sha256(tmp_path / "loose") != sha256(tmp_path / "stiff")
    assert report.record["inputs"]["Fisher information"]
    with pytest.raises(UsageError, match="has no Fisher information; make it with 'ktmerge stats"):
        tune(tiny_llama, tmp_path, "x", l2_sp=5.0, fisher="bare")
    with pytest.raises(UsageError, match="holds no statistics"):
        tune(tiny_llama, tmp_path, "x", l2_sp=5.0, fisher="chats.jsonl")
    with pytest.raises(UsageError, match="was measured in another model"):
        tune(tmp_path / "loose", tmp_path, "x", l2_sp=5.0, fisher="stats")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["any time", "while saving", "while publishing"])
def test_a_killed_run_with_everything_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path, moment: str) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "chats.jsonl", CHATS)
    settings = {**JOB, **EVERYTHING, "max_steps": 18, "save_every": 2}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(settings), tiny_llama, tmp_path, moment], stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "out.partial/log.jsonl", time.monotonic() + 1200
    while moment == "any time" and process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count('"loss"') >= 5:
            process.kill()
        time.sleep(0.002)
    assert process.wait(1200) == -signal.SIGKILL
    tune(tiny_llama, tmp_path, **settings, resume=True)
    for name in ("out", "out-last"):
        shutil.move(tmp_path / name, tmp_path / f"resumed-{name}")
    tune(tiny_llama, tmp_path, **settings)
    for name in ("out", "out-last"):
        assert sha256(tmp_path / name) == sha256(tmp_path / f"resumed-{name}")
