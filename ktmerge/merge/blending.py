"""A recipe to a checkpoint folder, or into a loaded model: plan, execute, record."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.digests import remember
from ktmerge.checkpoints.files import file_digest, refuse_overlap
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge.card import BASE_FILE as BASE_CARD
from ktmerge.merge.card import FILE as CARD
from ktmerge.merge.card import base_card, card
from ktmerge.merge.device import choose_device
from ktmerge.merge.lock import FILE as LOCK
from ktmerge.merge.lock import digesting, lock, lock_text, locked_now, recorded, require_unchanged
from ktmerge.merge.pin import Pin
from ktmerge.merge.plan import Plan
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.record import FILE as RECORD
from ktmerge.merge.record import record
from ktmerge.merge.report import BlendReport
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.schema import Recipe

if TYPE_CHECKING:
    from ktmerge.merge.pristine import Pristine


def blend(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    locked: Mapping[str, Any] | None = None,
    afresh: bool = False,
    progress: Progress = SILENT,
) -> BlendReport:
    """Blend base and experts into the checkpoint folder ``out``, which appears whole or not at all.

    Args:
        recipe: names base, experts and how to blend.
        out: its tensors get the base's names, its other files are the base's; ``ktmerge.json``, the lock
            ``ktmerge.lock.yaml`` and the model card ``README.md`` say how it was made.
        device: auto (the CPU), cpu or cuda; never changes the result.
        resume: go on with what an interrupted run of the same blend finished, and leave that if interrupted; keep
            ``out`` if it is this blend already.
        overwrite: replace a checkpoint that is there.
        locked: a lock: other inputs or settings than it says are refused, and so are other bytes.
        afresh: use nothing that an earlier blend of the same inputs found out.
        progress: where to report.

    Raises:
        UsageError: the recipe or its inputs are wrong or not as locked, or ``out`` exists.
        KtmergeError: the run failed; nothing is left behind.
    """
    from ktmerge.merge.engine import execute
    from ktmerge.merge.recollection import Recollection
    from ktmerge.merge.sinks import FileSink

    started = time.perf_counter()
    choose_device(device)
    plan = plan_blend(recipe)
    models = (plan.base, *(expert.checkpoint for expert in plan.experts))
    measured = [one.root for one in plan.statistics.values()]
    refuse_overlap(out, [*(root for one in models for root in one.roots), *measured])
    if resume and (report := recorded(plan, out, progress)) is not None:
        progress.note(f"{out} already holds this blend; kept")
        return report
    if locked is not None:
        for sentence in require_unchanged(locked, locked_now(plan)):
            progress.note(sentence)
    pin = Pin(plan)
    if resume:
        pin.look_again()
    with (
        _saying_what_stays(resume, progress),
        digesting(plan) as digested,
        Writer(out, overwrite, pin=pin.document, resume=resume, departure=pin.departure) as writer,
    ):
        for note in writer.notes:
            progress.note(note)
        writer.plan_like(plan.base, plan.dtypes)
        recollection = None if afresh else Recollection(plan)
        recollected = None if recollection is None else recollection.found
        report = execute(plan, FileSink(writer), device, progress, recollected=recollected)
        report.out = writer.digests()
        for file, changed in plan.texts.items():
            writer.add_text(file, changed)
        if recipe.output.dtype != "base" or plan.base.stale:
            for folder in ("", *(f"{branch}/" for branch, _ in plan.base.branches)):
                writer.add_text(f"{folder}config.json", _config(plan, folder))
        if locked is not None:
            _require_locked_output(locked, report)
        digests = digested()
        if recollection is not None:
            recollection.keep(digests)
        writer.add_text(CARD, card(plan, report))
        if (text := base_card(plan.base)) is not None:
            writer.add_text(BASE_CARD, text)
        carried = writer.copy_files(plan.base, skip=(LOCK, RECORD))
        known = {file: digests["base"][file].sha256 for file in carried if file in digests["base"]}
        report.beside = writer.beside(known, skip=(CARD, BASE_CARD, LOCK, RECORD))
        writer.add_text(LOCK, lock_text(lock(plan, digests, report)))
        report.beside[LOCK] = file_digest(writer.folder / LOCK)
        writer.add_text(RECORD, record(plan, report))
    for file, digest in report.out.items():
        remember(out / file, digest)
    for note in report.notes:
        progress.note(f"note: {note}")
    report.seconds = time.perf_counter() - started
    return report


def _require_locked_output(locked: Mapping[str, Any], report: BlendReport) -> None:
    wanted = locked.get("output", {}).get("sha256")
    if wanted is not None and wanted != report.out:
        differing = [file for file in {**wanted, **report.out} if wanted.get(file) != report.out.get(file)]
        raise KtmergeError(
            f"the blend gives other bytes than were locked ({', '.join(differing)}), from the same inputs by the same "
            "recipe; nothing was written. Compare versions with 'ktmerge recipe verify'."
        )


@contextmanager
def _saying_what_stays(resume: bool, progress: Progress) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if resume:
            progress.note("what was finished is kept; go on with --resume")
        raise


def blend_into(
    model: Any,
    recipe: Recipe,
    sources: Pristine | None = None,
    *,
    device: str = "auto",
    measured: bool = True,
    progress: Progress = SILENT,
) -> BlendReport:
    """Blend in place: write the result into the parameters of a loaded model of the base's architecture.

    Values are rounded as the recipe's output says, so that they equal those of the file route; a parameter of a type
    too narrow for that is rounded to its own. Tensors of the base that the model has no room for, as
    its library does not load them, are left out. If the run fails, the model is left partly changed.

    Args:
        model: a ``torch.nn.Module``.
        recipe: names base, experts and how to blend.
        sources: copies of base and experts in memory, for a sweep: what a blend lacks is read into them once.
        device: auto (where the model lies), cpu or cuda: where to compute; never changes the result.
        measured: say in the report what became of every tensor. A sweep asks for nothing: the report's ``tensors`` are
            empty then, and a candidate costs about as much as copying the parameters.
        progress: where to report.

    Raises:
        UsageError: the recipe or its inputs are wrong, or the model has other tensors than the base.
        KtmergeError: the run failed.
    """
    from ktmerge.merge.engine import execute
    from ktmerge.merge.sinks import LiveSink

    if not callable(getattr(model, "state_dict", None)):
        raise UsageError(
            f"blend_into takes a loaded model, not {type(model).__name__}; load it, or write a folder "
            "with ktmerge.blend(recipe, out)."
        )
    plan = plan_blend(recipe) if sources is None else sources.plan(recipe)
    sink = LiveSink(model, plan.base) if sources is None else sources.sink(model, plan.base)
    place = sink.device if device == "auto" else device
    report = execute(plan, sink, place, progress, pristine=sources, measured=measured)
    report.notes += sink.tell(progress)
    return report


def _config(plan: Plan, folder: str) -> str:
    """The base's ``config.json`` with the output's type where it names one: loaders go by it."""
    path = plan.base.root / folder / "config.json"
    try:
        text = plan.texts.get(f"{folder}config.json")
        document = json.loads(text or (path.read_text(encoding="utf-8") if path.exists() else "{}"))
    except (OSError, ValueError) as error:
        raise KtmergeError(f"{path}: cannot be read: {error}.") from None
    for section in [document, *(value for value in document.values() if isinstance(value, dict))]:
        for key in plan.base.stale:
            section.pop(key, None)
        for key in ("dtype", "torch_dtype") if plan.recipe.output.dtype != "base" else ():
            if isinstance(section.get(key), str):
                section[key] = plan.recipe.output.dtype
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
