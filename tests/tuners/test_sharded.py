"""Several processes: FSDP2 by torchrun on two gloo processes, to the result of one; their checkpoints are one's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tuning import CHATS, JOB, ROWS, tune, weights, write

from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.processes import Processes, passes_of, require_shareable
from ktmerge.tuners.sharing import Share, SharedBatches, muted

TOLERANCE = 1e-5
"""Of weights that moved by up to 5e-3: sums in another order, 3e-6 on processors with AVX2 alone."""

WATCHED = """
import json, sys
from pathlib import Path
from ktmerge.errors import KtmergeError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners import finetune, sharded

jobs, base, folder, flags = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
made = sharded.ShardedTrainer.__init__
def watched(self, **kwargs):
    made(self, **kwargs)
    from torch.distributed.tensor import DTensor
    held = [one for one in self.model.parameters()]
    assert held and all(isinstance(one, DTensor) for one in held)
    assert sum(one.to_local().numel() for one in held) < 0.6 * sum(one.numel() for one in held)
    (folder / f"sharded-{self._processes.rank}").touch()
sharded.ShardedTrainer.__init__ = watched
for out, job in jobs.items():
    finetune(FinetuneJob.model_validate(job), base, folder / out, folder=folder, **flags)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*command: str, count: int = 2) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return [*launcher, "--master-port", str(port), *command]


def two(base: Path, folder: Path, jobs: dict[str, dict[str, Any]], **flags: bool) -> None:
    """Fine-tunes one after the other on two processes, whose models are looked at."""
    write(folder / "train.jsonl", ROWS)
    write(folder / "chats.jsonl", CHATS)
    script = folder / "watched.py"
    script.write_text(WATCHED)
    settings = json.dumps({out: {**JOB, **job} for out, job in jobs.items()})
    command = torchrun(str(script), settings, str(base), str(folder), json.dumps(flags))
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def furthest(one: Path, other: Path) -> float:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


KINDS: dict[str, dict[str, Any]] = {
    "full": {"eval_upstream": "chats.jsonl", "eval_every": 4},
    "part": {"train": "last:1", "weight_decay": 0.1, "gradient_accumulation": 2, "max_steps": 5},
    "gradient": {"select": "gradient", "every": 4, "weight_decay": 0.1},
    "spider": {"select": "fused", "every": 4, "mask": "soft", "l2_sp": 0.5},
    "coins": {"select": "child_f", "average": "ema", "ema_decay": 0.9},
}


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    """30 samples in batches of 4: at the end of an epoch one process is short of samples."""
    two(tiny_llama, tmp_path, KINDS)
    assert {path.name for path in tmp_path.glob("sharded-*")} == {"sharded-0", "sharded-1"}
    base = weights(tiny_llama)
    for name, job in KINDS.items():
        tune(tiny_llama, tmp_path, f"one-{name}", **job)
        assert furthest(tmp_path / name, tmp_path / f"one-{name}") < TOLERANCE, name
        moved, alone = ({key: one != base[key].float() for key, one in weights(tmp_path / out).items()}
                        for out in (name, f"one-{name}"))  # fmt: skip
        assert all(bool((moved[key] == alone[key]).all()) for key in moved), name
        if "select" in job:
            masks = [(tmp_path / out / "ktmerge-selection.safetensors").read_bytes() for out in (name, f"one-{name}")]
            assert masks[0] == masks[1], name
        told = json.loads((tmp_path / name / "ktmerge-run.json").read_text())
        lone = json.loads((tmp_path / f"one-{name}" / "ktmerge-run.json").read_text())
        assert told["run"]["processes"] == 2
        assert told["inputs"] == lone["inputs"]
        assert told["losses"]["last"] == pytest.approx(lone["losses"]["last"], abs=1e-5)


def stop_after(step: int, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run, and send the launcher a Ctrl-C once so many steps are logged."""
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    log = folder / "out.partial/log.jsonl"
    deadline = time.monotonic() + 1200
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count('"loss"') >= step:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.005)
    out, err = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_stopped_run_goes_on_with_another_number_of_processes(tiny_llama: Path, tmp_path: Path, first: int) -> None:
    settings = {"max_steps": 400, "select": "gradient", "every": 150, "average": "ema", "save_every": 10_000}
    write(tmp_path / "train.jsonl", ROWS)
    job = {**JOB, **settings}
    command = ["-m", "ktmerge", "finetune", "--base", str(tiny_llama), "--data", "train.jsonl", "--out", "out"]
    command += [word for key, value in job.items() if key != "data" for word in ("--set", f"{key}={value}")]
    alone, together = [sys.executable, *command], torchrun(*command)
    found: list[Path] = []
    for _ in range(5):  # on a busy machine the launcher may pass the signal on when all steps are done
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        stopped = stop_after(3, alone if first == 1 else together, tmp_path)
        assert stopped.returncode != 0
        assert stopped.stdout == ""
        assert stopped.stderr.count("go on with --resume") == 1, stopped.stderr
        assert "Traceback" not in stopped.stderr.split("torch/distributed")[0]
        found = list((tmp_path / "out.partial").glob("checkpoint-*"))
        if f"after step {settings['max_steps']} of" not in stopped.stderr:
            break
    (left,) = found
    assert (left / "complete.json").exists()
    again = subprocess.run(
        [*(together if first == 1 else alone), "--resume"],
        cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("going on after step") == 1
    assert again.stdout.count("tuned model") == 1
    tune(tiny_llama, tmp_path, "unbroken", **settings)
    assert furthest(tmp_path / "out", tmp_path / "unbroken") < 1e-4  # 400 steps of 1e-3
    masks = [(tmp_path / out / "ktmerge-selection.json").read_text() for out in ("out", "unbroken")]
    assert json.loads(masks[0])["selections"] == json.loads(masks[1])["selections"]


@pytest.mark.slow
def test_mistakes_are_told_once(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    command = ["-m", "ktmerge", "finetune", "--base", str(tiny_llama), "--out", "out", "--set", "batch_size=4"]
    done = subprocess.run(
        torchrun(*command, "--data", "gone.jsonl"),
        cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("gone.jsonl: no such file") == 1, done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_step_is_shared_equally_or_not_at_all() -> None:
    assert passes_of(4, 1, 1) == (4, 1)
    assert passes_of(4, 1, 2) == (2, 1)
    assert passes_of(4, 6, 3) == (4, 2)
    assert passes_of(6, 2, 4) == (3, 1)
    assert passes_of(1, 8, 8) == (1, 1)
    for batch, accumulation, count in ((4, 1, 3), (1, 1, 2), (3, 3, 2)):
        with pytest.raises(UsageError, match=f"{count} processes cannot share the {batch * accumulation} samples"):
            passes_of(batch, accumulation, count)


@pytest.mark.parametrize(("batch", "accumulation", "count"), [(4, 1, 2), (2, 4, 2), (4, 3, 4), (1, 8, 8), (3, 4, 6)])
def test_all_processes_together_take_what_one_takes(batch: int, accumulation: int, count: int) -> None:
    """Step by step the same samples, each once; and every process the same number of batches."""
    order = [(7 * place) % 29 for place in range(29)]
    size, passes = passes_of(batch, accumulation, count)
    shares = [list(SharedBatches(order, size, passes, rank, count)) for rank in range(count)]
    lengths = {len(SharedBatches(order, size, passes, rank, count)) for rank in range(count)}
    assert {len(share) for share in shares} == lengths
    step = batch * accumulation
    for number, first in enumerate(range(0, len(order), step)):
        taken = [
            place
            for share in shares
            for own in share[number * passes : (number + 1) * passes]
            for place in own
            if place >= 0
        ]
        assert sorted(taken) == sorted(order[first : first + step])


def test_who_is_short_of_samples_has_one_that_teaches_nothing() -> None:
    from array import array

    from ktmerge.tuners.encode import Encoded

    samples = [Encoded(array("q", [1, 2, 3]), bytes([0, 1, 1])), Encoded(array("q", [4, 5]), bytes([0, 1]))]
    batches = list(SharedBatches([1, 0, 1], 1, 1, 1, 2))
    assert batches == [[0], [-2]]
    assert Share(samples)[-2] == muted(samples[1])
    assert not any(Share(samples)[-2].trained)
    assert Share(samples)[0] is samples[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"distill": 1.0}, "distill"),
        ({"adapter": "lora"}, "adapter"),
        ({"packing": True}, "packing"),
        ({"optimizer": "adafactor"}, "optimizer adafactor; take adamw or sgd"),
        ({"curriculum": "easy"}, "curriculum easy"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings: dict[str, Any], told: str) -> None:
    job = FinetuneJob.model_validate({"data": ["x"], **settings})
    require_shareable(job, 1)
    with pytest.raises(UsageError, match=f"cannot be had with {told}"):
        require_shareable(job, 2)


def test_a_launcher_that_would_shard_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="started one process, so nothing would be sharded"):
        Processes.join()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="set to DeepSpeed"):
        Processes.join()
