"""What is logged, as event files for TensorBoard.

The log is what counts: a run that goes on writes all events anew from it, so that none is there twice or missing.
Imports transformers; import it only where it is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

FOLDER = "tensorboard"
"""In the working folder, while the run lasts."""
EVENTS = "ktmerge-events.tfevents"
"""Beside the weights, afterwards."""
_PREFIXES = {"eval_": "evaluation/"}


class BoardCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes every number of a log as it grows.

    Args:
        log: lines of JSON, each with its ``step``.
        folder: for the event file; emptied first.
    """

    def __init__(self, log: Path, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        writer: Any = SummaryWriter
        self._writer = writer(str(folder))
        self._log, self._folder = log, folder
        self._told = 0
        self._tell()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._writer.close()

    def publish(self, folder: Path) -> None:
        """Put all events as one file among a finished run's."""
        self._writer.close()
        written = sorted(self._folder.iterdir())
        (folder / EVENTS).write_bytes(b"".join(path.read_bytes() for path in written))

    def _tell(self) -> None:
        # split("\n"), not splitlines(): what a model says may hold other line separators of Unicode
        lines = self._log.read_text(encoding="utf-8").split("\n")[:-1] if self._log.exists() else []
        for line in lines[self._told :]:
            self._write(json.loads(line))
        self._told = len(lines)
        self._writer.flush()

    def _write(self, found: Mapping[str, Any]) -> None:
        for key, value in found.items():
            if key not in ("step", "epoch") and isinstance(value, int | float):
                prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
                name = f"training/{key}" if prefix is None else _PREFIXES[prefix] + key.removeprefix(prefix)
                self._writer.add_scalar(name, value, found["step"])
