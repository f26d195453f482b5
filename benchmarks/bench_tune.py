"""Fine-tune the same model on the same rows with ktmerge and with TRL's SFTTrainer: tokens per second, memory, losses.

    python benchmarks/bench_tune.py                       # the demo's model, answers of one word, 9 steps of 16 rows
    python benchmarks/bench_tune.py --runs 3 --json results.json
    python benchmarks/bench_tune.py --base ./base --data rows.jsonl --batch 8 --steps 20
    python benchmarks/bench_tune.py --sides ktmerge,trl,trl_defaults,ktmerge_packed

Both train every weight in fp32 by AdamW at the same rates, on prompt-completion rows in the same order. `trl_defaults`
is SFTTrainer with its own precision (bfloat16) and activation checkpointing; its losses are not comparable.
Every run is a process of its own; the sides take turns, and ratios are medians over the turns. Speed is taken from the
end of the first step to the end of the last, in tokens of rows without padding (by the process's own CPU time, too,
which tells of a machine that others use); memory is the peak of the whole
process by the operating system's account, loading and saving included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from bench_blend import measure

RATE, SEED = 2e-5, 42
SETTINGS = {"learning_rate": RATE, "scheduler": "cosine", "warmup": 0, "precision": "float32", "seed": SEED}
SIDES = {
    "ktmerge": {},
    "ktmerge_packed": {"packing": True},
    "trl": {"bf16": False, "gradient_checkpointing": False},
    "trl_defaults": {},
}
"""Settings of each side; SFTTrainer's defaults are bfloat16 and checkpointing."""


@dataclass(frozen=True)
class Run:
    """One fine-tune: tokens per second and per second of CPU time, GB at the peak, seconds of the whole process, and
    the loss of every step."""

    speed: float
    cpu_speed: float
    peak_gb: float
    wall: float
    losses: list[float]


def demo_rows(folder: Path) -> Path:
    """The demo's short-answer set: a film review each, to be answered by one word."""
    from ktmerge.checkpoints.cache import cache_folder
    from ktmerge.demo.data import write_data

    write_data(folder, cache_folder())
    return folder / "train" / "verdicts.jsonl"


def demo_base() -> Path:
    from ktmerge.checkpoints.cache import cache_folder
    from ktmerge.demo.model import base_model

    return base_model(cache_folder())


class Ends:
    """When each step ended, on the wall's clock and on the process's."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def mark(self) -> None:
        self.wall.append(monotonic())
        self.cpu.append(process_time())

    def report(self, path: str, losses: list[float]) -> None:
        found = {"losses": losses, "wall": self.wall[-1] - self.wall[0], "cpu": self.cpu[-1] - self.cpu[0]}
        Path(path).write_text(json.dumps(found), encoding="utf-8")


def train_by_ktmerge(side: str, base: str, data: str, out: str, batch: int, steps: int) -> None:
    """What one side's process does."""
    from ktmerge import api

    ends = Ends()

    class Clock:
        """Progress that only marks the ends of steps."""

        def __init__(self) -> None:
            self._is_training = False

        def note(self, text: str) -> None:
            pass

        @contextmanager
        def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Any]:
            self._is_training = description.startswith("fine-tuning")
            yield self

        def advance(self, amount: float = 1) -> None:
            if self._is_training and amount:
                ends.mark()

    settings = {**SETTINGS, **SIDES[side], "batch_size": batch, "max_steps": steps, "save_dtype": "bfloat16"}
    api.finetune(base, data, out, progress=Clock(), **settings)
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    ends.report(f"{out}.json", [line["loss"] for line in lines if "loss" in line])


def train_by_trl(side: str, base: str, data: str, out: str, batch: int, steps: int) -> None:
    """What the other side's process does."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends = Ends()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.mark()

    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    arguments = SFTConfig(
        output_dir=out,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
        **SIDES[side],
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    ends.report(f"{out}.json", [line["loss"] for line in trainer.state.log_history if "loss" in line])


def step_tokens(base: Path, data: Path, batch: int, steps: int) -> list[int]:
    """Tokens of each step without padding, in the order in which transformers' Trainer draws rows by the seed."""
    import torch
    from torch.utils.data import RandomSampler

    from ktmerge.recipes.finetuning import FinetuneJob
    from ktmerge.tuners.data import read_data
    from ktmerge.tuners.encode import Encoder, encode_all

    samples = encode_all(
        Encoder.load(base), read_data([str(data)], Path.cwd()).samples, FinetuneJob(data=["-"]).max_length
    )
    lengths = [len(sample) for sample in samples.samples]
    order: list[int] = []
    generator = torch.Generator().manual_seed(SEED)
    while len(order) < batch * steps:
        order += list(RandomSampler(lengths, generator=generator))
    return [sum(lengths[place] for place in order[first : first + batch]) for first in range(0, batch * steps, batch)]


def run(side: str, base: Path, data: Path, folder: Path, batch: int, steps: int, tokens: float) -> Run:
    out = folder / side
    shutil.rmtree(out, ignore_errors=True)
    given = {"side": side, "base": str(base), "data": str(data), "out": str(out), "batch": batch, "steps": steps}
    cost = measure([sys.executable, __file__, "--child", json.dumps(given)])
    found = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return Run(tokens / found["wall"], tokens / found["cpu"], cost.peak_gb, cost.wall, found["losses"])


def compare(found: dict[str, list[Run]], against: str) -> dict[str, Any]:
    """Medians of every side, and each side's relation to one of them."""
    told: dict[str, Any] = {}
    for side, runs in found.items():
        first, other = runs[0], found[against]
        told[side] = {
            "tokens_per_second": statistics.median(run.speed for run in runs),
            "tokens_per_cpu_second": statistics.median(run.cpu_speed for run in runs),
            "peak_gb": statistics.median(run.peak_gb for run in runs),
            "wall": statistics.median(run.wall for run in runs),
            "speed_ratio": statistics.median(a.speed / b.speed for a, b in zip(runs, other, strict=True)),
            "cpu_ratio": statistics.median(a.cpu_speed / b.cpu_speed for a, b in zip(runs, other, strict=True)),
            "memory_ratio": statistics.median(a.peak_gb / b.peak_gb for a, b in zip(runs, other, strict=True)),
            "loss_difference": max(abs(a - b) for a, b in zip(first.losses, other[0].losses, strict=True)),
            "losses": first.losses,
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="default: the demo's model")
    parser.add_argument("--data", type=Path, help="JSONL of prompt and completion; default: the demo's film reviews")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sides", default="ktmerge,trl", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ktmerge-bench-tune")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        given = json.loads(arguments.child)
        (train_by_ktmerge if given["side"].startswith("ktmerge") else train_by_trl)(**given)
        return

    arguments.folder.mkdir(parents=True, exist_ok=True)
    base = arguments.base or demo_base()
    data = arguments.data or demo_rows(arguments.folder / "data")
    counts = step_tokens(base, data, arguments.batch, arguments.steps)
    print(f"{platform.machine()}, {os.cpu_count()} cores; {arguments.steps} steps of {arguments.batch} rows, "
          f"{sum(counts)} tokens; load before: {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    found: dict[str, list[Run]] = {side: [] for side in arguments.sides.split(",")}
    for _ in range(arguments.runs):
        for side, runs in found.items():
            one = run(side, base, data, arguments.folder, arguments.batch, arguments.steps, sum(counts[1:]))
            runs.append(one)
            print(f"{side:16s} {one.speed:7.1f} tokens/s {one.cpu_speed:7.1f} a CPU second {one.peak_gb:6.2f} GB "
                  f"{one.wall:7.1f} s in all", flush=True)  # fmt: skip
    against = "trl" if "trl" in found else next(iter(found))
    told = compare(found, against)
    for side, one in told.items():
        print(f"{side} / {against}: {one['speed_ratio']:.2f} x tokens/s ({one['cpu_ratio']:.2f} x by CPU time), "
              f"{one['memory_ratio']:.2f} x memory; losses differ by {one['loss_difference']:.1e} at most")  # fmt: skip
    print("step  " + "  ".join(f"{side:>14s}" for side in told))
    for step, losses in enumerate(zip(*(one["losses"] for one in told.values()), strict=True), start=1):
        print(f"{step:4d}  " + "  ".join(f"{loss:14.4f}" for loss in losses))
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
