"""What a run leaves in the working folder: trained weights, under transformers' names for files, and how it went."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktmerge.tuners.assembly import Assembly
from ktmerge.tuners.assignment import Assignment
from ktmerge.tuners.order import CURRICULUM
from ktmerge.tuners.report import LOSSES, draw_losses

FACTS = "run.json"
"""File beside the trained weights: how the training went."""


def seal(given: Assignment, made: Assembly, seconds: float) -> None:
    """Write it; checkpoints may go then.

    Args:
        given: what was to be done.
        made: what did it; training is over.
        seconds: that it took.

    Raises:
        KtmergeError: an adapter's folded weights say something else than the adapter did.
    """
    from transformers import GenerationConfig

    from ktmerge.tuners.ending import save_weights

    final, trainer = given.partial.final, made.trainer
    model: Any = trainer.model
    plain: Any = GenerationConfig
    model.generation_config = plain()  # the base's travels as a file; an odd one would be refused here
    told: dict[str, Any] = {}
    save = _save_adapted(given, made, told)
    averages = save_weights(trainer, made.keeping, given.job, given.partial, given.progress, save)
    if made.selection is not None:
        made.selection.publish(final, given.base)
    facts = {
        "steps": int(trainer.state.global_step),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(trainer.tokens_per_second, 1),
        "device": given.machine.name,
        "precision": given.machine.precision,
        "threads": given.machine.threads,
        **({"processes": given.processes.count} if given.processes.is_several else {}),
        "seed": given.job.seed,
        "parameters": made.trained.total,
        "trained": made.trained.to_json(),
        **averages,
        **told,
    }
    order = given.partial.folder / CURRICULUM
    if order.exists():
        shutil.copyfile(order, final / CURRICULUM)
    if given.processes.is_first:
        (final / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (final / LOSSES).write_bytes(draw_losses(given.partial.log, given.name))
    if made.board is not None:
        made.board.publish(final)
    given.partial.seal(final, given.total, seconds)
    given.partial.drop_checkpoints()


def _save_adapted(given: Assignment, made: Assembly, told: dict[str, Any]) -> Callable[[Any, Path], None] | None:
    """How the model is saved if it has an adapter; what is to be told of it goes into ``told``."""
    adapted = made.adapted
    if adapted is None:
        return None
    from ktmerge.tuners.adapters.saving import probe, save_result

    def save(model: Any, folder: Path) -> None:
        logits = probe(made.trainer, given.samples)
        told.update(save_result(adapted, folder, given.partial.kept_adapter, logits))

    return save
