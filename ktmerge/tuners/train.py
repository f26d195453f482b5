"""The way of one fine-tune: read and check everything, train in ``<out>.partial``, publish ``out`` in one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.files import clear_os_errors, refuse_holding
from ktmerge.errors import KtmergeError, ToldElsewhereError, UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.assignment import Assignment
from ktmerge.tuners.finished import is_finished
from ktmerge.tuners.images.agreement import require_alike
from ktmerge.tuners.material import Material
from ktmerge.tuners.outputs import Outputs
from ktmerge.tuners.partial import Partial, as_object, read_object
from ktmerge.tuners.processes import Processes, require_shareable
from ktmerge.tuners.report import RECORD, FinetuneReport, record_of
from ktmerge.tuners.result import FACTS
from ktmerge.tuners.run import train


def finetune(
    job: FinetuneJob,
    base: Path,
    out: Path,
    *,
    folder: Path,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> FinetuneReport:
    """Fine-tune the checkpoint ``base``, all of it or what ``job.train`` says, into the folder ``out``.

    Args:
        job: what to do.
        base: folder of the base.
        out: the tuned checkpoint; appears whole or not at all.
        folder: where the job's data paths start.
        resume: go on with ``<out>.partial`` if it is there, to the very bytes an unbroken run gives; keep ``out`` if it
            is already what the job asks for, its weights to the byte.
        overwrite: replace ``out`` in one step at the end; without ``resume``, start afresh.
        progress: told steps and losses.

    Raises:
        UsageError: wrong data or base, or an output that neither flag allows to touch.
        KtmergeError: out of memory, a full disk, a loss that is no number.
        KeyboardInterrupt: stopped by Ctrl-C, after saving where it was.
    """
    processes, outputs = Processes.join(), Outputs.of(job, out)
    progress = processes.voice(progress)
    require_shareable(job, processes.count)
    with processes.together():
        outputs.refuse(base, overwrite=overwrite, resume=resume)
        material = Material.read(job, base, folder, progress)
        refuse_holding(out, [folder / file for found in material.data.values() for file in found.files])
        if processes.is_several:
            require_alike(material.encoded)
    inputs = material.inputs(job, processes.first(lambda: material.base.content_digest(progress)))
    if resume and processes.first((out / RECORD).exists):
        finished = processes.first(lambda: _finished(out, inputs, overwrite))
        if finished is not None:
            Partial(out, inputs, processes).discard()
            progress.note(f"{out}: is already what the job asks for.")
            return finished
    with Partial(out, inputs, processes) as partial:
        saved = partial.open(resume=resume, overwrite=overwrite)
        if saved is None or saved.path != partial.final:
            given = Assignment(
                job=job,
                base=material.base,
                encoder=material.encoder,
                encoded=material.encoded,
                partial=partial,
                name=out.name,
                progress=progress,
                fisher=material.fisher,
                processes=processes,
                folder=folder,
                sizes=material.data["train"].sizes,
            )
            train(given, saved)

        def publish() -> dict[str, Any]:
            facts = read_object(partial.final / FACTS)
            with clear_os_errors(partial.log):
                record = record_of(job, base, inputs, material.data, material.encoded, facts, partial.log)
            return outputs.publish(
                material.base, partial, record, overwrite=overwrite, resume=resume, progress=progress
            )

        with _telling_what_is_kept():
            record = processes.first(publish)
        partial.finish()
    return FinetuneReport(out, record)


@contextmanager
def _telling_what_is_kept() -> Iterator[None]:
    """Training is over: what fails from here on, a full disk for one, costs none of it."""
    try:
        yield
    except (UsageError, ToldElsewhereError):
        raise
    except KtmergeError as error:
        raise KtmergeError(f"{error} The trained weights are kept: --resume goes on from them.") from error


def _finished(out: Path, inputs: dict[str, Any], overwrite: bool) -> FinetuneReport | None:
    """The report of a finished output; None if it is to be replaced. Raises as `is_finished`."""
    record = read_object(out / RECORD)
    files = as_object(as_object(record.get("output")).get("sha256"))
    kept = is_finished(out, as_object(record.get("inputs")), inputs, files, overwrite=overwrite)
    return FinetuneReport(out, record) if kept else None
