"""What a world is: a base, experts tuned from it, and sets of items that any model of its shape is scored on."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SELECT, REPORT = "select", "report"
"""Splits that are scored: knobs are chosen on the first, results are reported on the second; no item is in both."""

CALIBRATION = 128
"""Examples of the training data that statistics are measured on."""
TOKENS = 2048
"""Rows kept of what each linear map was given."""

Scores = dict[str, "NDArray[np.float64]"]
"""Of every set: the score of each item, 0 to 100."""


@dataclass(frozen=True, eq=False)
class World:
    """One world, whatever it is made of.

    Attributes:
        name: of its folder.
        model: what the model is, in a few words.
        measure: what the scores of the items are.
        upstream: sets the base is good at.
        tasks: sets to learn, one expert each; the single-task part is about the first.
        train: makes ``folder/base`` and ``folder/<task>``, all of one seed; what is there stays.
        load: the model in a folder, ready to be scored.
        score: item scores of a model on some sets of a split.
        items: how much is scored, for records of scores.
        calibration: what statistics are measured on: single examples of the training data of ``upstream`` or of a task,
            as keywords of the model ``[1, ...]``, and which tokens are answers ``[tokens]``.
        sees: whether its model takes pictures.
        rows: so many examples of the training data of some sets, drawn by a seed, as `ktmerge finetune` reads them.
        dress: puts a tokenizer, or a processor, beside a model, without which `ktmerge finetune` cannot read any.
    """

    name: str
    model: str
    measure: str
    upstream: tuple[str, ...]
    tasks: tuple[str, ...]
    train: Callable[[Path, int], None]
    load: Callable[[Path], Any]
    score: Callable[[Any, str, Sequence[str]], Scores]
    items: Mapping[str, Any]
    calibration: Callable[[str], Iterator[tuple[Mapping[str, Tensor], Tensor]]]
    sees: bool
    rows: Callable[[Sequence[str], int, int], list[dict[str, Any]]]
    dress: Callable[[Path], None]


def fit(model: Any, batch: Callable[[int], Mapping[str, Any]], steps: int, rate: float) -> None:
    """Train all weights: AdamW without decay, 5 % warm-up, cosine, clipped at 1.

    Args:
        model: a transformers model.
        batch: keywords of the model, by step.
        steps: how many.
        rate: the highest learning rate.
    """
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / (steps - warm)))),
    )
    model.train()
    for step in range(steps):
        model(**batch(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
    model.eval()


def keep(folder: Path, make: Callable[[], Any], settings: Mapping[str, Any]) -> None:
    """Save the model that ``make`` trains in ``folder``, unless one of the same settings is there."""
    mark = folder / "settings.json"
    text = json.dumps(settings, sort_keys=True, indent=1)
    if mark.is_file() and mark.read_text() == text:
        return
    model = make()
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    model.save_pretrained(temporary)
    (temporary / mark.name).write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def measure(world: World, model: Path, name: str, out: Path) -> None:
    """Measure a model on a set's training data, as ``ktmerge stats`` does: inputs and Fisher information."""
    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.recipes.schema import Statistics
    from ktmerge.tuners.statistics.collector import Collector
    from ktmerge.tuners.statistics.examples import Example

    if (out / "statistics.json").is_file():
        return
    scratch, made = (out.with_name(f".{out.name}-{os.getpid()}-{what}") for what in ("scratch", "made"))
    for folder in (scratch, made):
        folder.mkdir(parents=True)
    job = Statistics(tokens=TOKENS, fisher="empirical")
    collector = Collector(world.load(model), Checkpoint.open(model), job, scratch)
    for number, (keywords, answers) in enumerate(world.calibration(name)):
        collector.observe(number, Example(keywords, answers))
    collector.close()
    collector.write(made)
    shutil.rmtree(scratch)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(made, out)
