"""Runs that are stopped or killed, and what they logged."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tuning import Listener


class StopsAt(Listener):
    """Sends the process a Ctrl-C when a step is done, as a person would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def advance(self, amount: float = 1) -> None:
        super().advance(amount)
        if self._name.startswith("fine-tuning") and self.tasks[self._name] == self._step:
            os.kill(os.getpid(), signal.SIGINT)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from ktmerge.recipes.finetuning import FinetuneJob
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
    from ktmerge.checkpoints.writer import Writer
    Writer.copy_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
finetune(FinetuneJob.model_validate(job), base, folder / "out", folder=folder)
"""


def log_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
