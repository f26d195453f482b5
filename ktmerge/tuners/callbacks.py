"""What happens between steps: when to log, evaluate and save; the log file; progress; and stopping when asked.

Imports transformers; import it only where it is needed.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from ktmerge.checkpoints.signals import answer_stopping, leave_terminal
from ktmerge.errors import KtmergeError
from ktmerge.progress import Progress, Step

_SECONDS_BETWEEN_SAVES = 300.0
_NOTES = 10
_SAME_SECONDS = 1.0
"""Signals that come so close together are one wish: torchrun passes on what a terminal sent to all."""


@dataclass(frozen=True)
class Rhythm:
    """How often things happen, in steps; ``save_every`` None: a fifth of the run, five minutes apart at least."""

    total: int
    log_every: int
    eval_every: int
    save_every: int | None
    evaluates: bool

    @property
    def save_step(self) -> int:
        return self.save_every or max(1, math.ceil(self.total / 5))


class Interruption:
    """While active, the first Ctrl-C (SIGTERM, or SIGHUP of a closed terminal) only asks to stop after the step; the
    second stops at once."""

    def __init__(self, progress: Progress) -> None:
        self.requested = False
        self._asked: float | None = None  # when; another process may have been asked before this one
        self._progress = progress
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = answer_stopping(self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        now = monotonic()
        if self._asked is not None:
            if now - self._asked < _SAME_SECONDS:
                return
            raise KeyboardInterrupt
        self.requested, self._asked = True, now
        self._progress.note("stopping: this step is finished and saved first. Once more stops at once.")


class RhythmCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Decides after every step what is due.

    Args:
        rhythm: how often.
        interruption: whether to stop.
        saved: told of every checkpoint that was written.
        agreed: of several processes, whether something holds in any.
    """

    def __init__(
        self,
        rhythm: Rhythm,
        interruption: Interruption,
        saved: Callable[[Path, int], None],
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        self._agreed = agreed
        self._rhythm = rhythm
        self._interruption = interruption
        self._saved = saved
        self._last_save = monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step, rhythm = state.global_step, self._rhythm
        last = step >= rhythm.total
        control.should_log = last or step == 1 or step % rhythm.log_every == 0
        control.should_evaluate = rhythm.evaluates and (last or step % rhythm.eval_every == 0)
        # the last step is saved as the result instead
        if self._agreed(self._interruption.requested):
            self._interruption.requested = True
        control.should_save = not last and (self._interruption.requested or self._agreed(self._is_due(step)))
        control.should_training_stop = last or self._interruption.requested
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        self._last_save = monotonic()

    def _is_due(self, step: int) -> bool:
        if step % self._rhythm.save_step:
            return False
        return self._rhythm.save_every is not None or monotonic() - self._last_save >= _SECONDS_BETWEEN_SAVES


class StepCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells a listener of every finished step, before it is decided what is due."""

    def __init__(self, finished: Callable[[int], None]) -> None:
        self._finished = finished

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finished(int(state.global_step))


class EpochCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells a listener which epoch begins, or is gone on with."""

    def __init__(self, begun: Callable[[int], None]) -> None:
        self._begun = begun

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun(int(state.epoch or 0))


class EvaluationCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Shows a watcher every evaluation's upstream loss; the run stops if it says so."""

    def __init__(self, watch: Callable[[int, float], bool]) -> None:
        self._watch = watch

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        if self._watch(int(state.global_step), float(metrics["eval_upstream_loss"])):
            control.should_training_stop = True
            control.should_save = False  # a run that goes on from here would not know that it is over
        return control


class LogCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Appends one line to the log for every report of the Trainer, tells a person now and then, moves the bar."""

    def __init__(self, log: Path, rhythm: Rhythm, progress: Progress, bar: Step, seconds: Callable[[], float]) -> None:
        self._log = log
        self._rhythm = rhythm
        self._progress = progress
        self._bar = bar
        self._seconds = seconds
        self._loss: float | None = None
        self._begun: tuple[int, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._begun is None:
            self._begun = int(state.global_step), self._seconds()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        found = {key: value for key, value in (logs or {}).items() if not key.startswith("train_")}
        if not any(key.endswith("loss") for key in found):
            return
        line = {"step": state.global_step, **found, "seconds": round(self._seconds(), 2)}
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._require_finite(line)
        self._loss = found.get("loss", self._loss)
        self._note(state.global_step, found)

    def _require_finite(self, line: dict[str, Any]) -> None:
        for key in ("loss", "grad_norm"):
            if not math.isfinite(line.get(key, 0.0)):
                raise KtmergeError(
                    f"training diverged: {key} is {line[key]} at step {line['step']}; "
                    "lower learning_rate, or raise warmup."
                )

    def _note(self, step: int, found: dict[str, Any]) -> None:
        evaluated = {key[5:-5]: value for key, value in found.items() if key.startswith("eval_")}
        often = max(1, self._rhythm.total // _NOTES)
        if not evaluated and (self._rhythm.evaluates or (step % often and step != self._rhythm.total)):
            return
        losses = {**({} if self._loss is None else {"training": self._loss}), **evaluated}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._progress.note(f"step {step}/{self._rhythm.total}: loss {shown}{self._left(step)}")

    def _left(self, step: int) -> str:
        """The time until the last step, evaluations included, at the pace so far."""
        if self._begun is None or step <= self._begun[0] or step >= self._rhythm.total:
            return ""
        first, start = self._begun
        return f"; {_duration((self._seconds() - start) / (step - first) * (self._rhythm.total - step))} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
