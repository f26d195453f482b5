"""The way of one fine-tune: read and check everything, train in ``<out>.partial``, publish ``out`` in one step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktmerge.checkpoints import Checkpoint, refuse_overlap, tensor_class
from ktmerge.checkpoints.limits import context_length
from ktmerge.checkpoints.staging import refuse_output
from ktmerge.checkpoints.statistics import Statistics
from ktmerge.errors import KtmergeError, ToldElsewhereError, UsageError, collected, refuse
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners.assignment import Assignment
from ktmerge.tuners.data import DataSet, read_data
from ktmerge.tuners.encode import EncodedSet, Encoder, encode_all
from ktmerge.tuners.export import export, publish_adapter
from ktmerge.tuners.images.agreement import require_alike
from ktmerge.tuners.images.opening import open_encoder
from ktmerge.tuners.optimizers import require_optimizer
from ktmerge.tuners.partial import LOG, Partial, differences, read_object
from ktmerge.tuners.processes import Processes, require_shareable
from ktmerge.tuners.report import RECORD, FinetuneReport, inputs_of, record_of
from ktmerge.tuners.result import FACTS
from ktmerge.tuners.run import train
from ktmerge.tuners.trained import require_trainable


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
            is already what the job asks for.
        overwrite: replace ``out`` in one step at the end; without ``resume``, start afresh.
        progress: told steps and losses.

    Raises:
        UsageError: wrong data or base, or an output that neither flag allows to touch.
        KtmergeError: out of memory, a full disk, a loss that is no number.
        KeyboardInterrupt: stopped by Ctrl-C, after saving where it was.
    """
    processes = Processes.join()
    progress = processes.voice(progress)
    require_shareable(job, processes.count)
    with processes.together():
        refuse_overlap(out, [base])
        refuse_output(out, overwrite or (resume and (out / RECORD).exists()))
        checkpoint = _open_base(base)
        require_trainable(checkpoint, job)
        require_optimizer(job)
        fisher = _open_fisher(job, folder, checkpoint)
        last = out.with_name(f"{out.name}-last") if job.average != "none" and job.export == "both" else None
        kept = out.with_name(f"{out.name}-adapter") if job.adapter is not None and job.adapter.keep else None
        for beside in (last, kept):
            if beside is not None:
                refuse_overlap(beside, [base])
                refuse_output(beside, overwrite or resume)
        data = _read(job, folder)
        encoder, seen = open_encoder(checkpoint, [one for found in data.values() for one in found.samples], progress)
        encoded = _encode(encoder, data, _longest_allowed(job, checkpoint), progress)
        if processes.is_several:
            require_alike(encoded)
    inputs = inputs_of(job, checkpoint, processes.first(lambda: checkpoint.content_digest(progress)), data)
    if fisher is not None:
        inputs["Fisher information"] = fisher.digest
    if seen.digests:
        inputs |= {f"images ({name})": seen.digest(found.samples) for name, found in data.items()}
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
                base=checkpoint,
                encoder=encoder,
                encoded=encoded,
                partial=partial,
                name=out.name,
                progress=progress,
                fisher=fisher,
                processes=processes,
                folder=folder,
                sizes=data["train"].sizes,
            )
            train(given, saved)

        def publish() -> dict[str, Any]:
            facts = read_object(partial.final / FACTS)
            record = record_of(job, base, inputs, data, encoded, facts, partial.log)
            texts = {
                RECORD: json.dumps(record, indent=2, ensure_ascii=False) + "\n",
                LOG: partial.log.read_text("utf-8"),
            }
            if last is not None:
                export(
                    checkpoint,
                    partial.last,
                    last,
                    dtype=job.save_dtype,
                    texts=texts,
                    overwrite=overwrite or resume,
                    progress=progress,
                )
            if kept is not None:
                publish_adapter(partial.kept_adapter, kept, texts={}, overwrite=overwrite or resume)
            if job.adapter is not None and not job.adapter.family.folds:
                publish_adapter(partial.final, out, texts=texts, overwrite=overwrite)
                return record
            export(
                checkpoint,
                partial.final,
                out,
                dtype=job.save_dtype,
                texts=texts,
                extras=sorted(partial.final.glob("ktmerge-*")),
                overwrite=overwrite,
                progress=progress,
            )
            return record

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


def _open_fisher(job: FinetuneJob, folder: Path, base: Checkpoint) -> Statistics | None:
    if job.fisher is None:
        return None
    from ktmerge.tuners.keeping.pull import open_fisher

    return open_fisher(folder / job.fisher, base)


def _open_base(base: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(base)
    packed = next((n for n, i in checkpoint.tensors.items() if tensor_class(n, i, checkpoint.config) == "quant"), None)
    if packed is not None:
        raise UsageError(f"{base}: is quantised ('{packed}'); fine-tune the model it was made from.")
    return checkpoint


def _read(job: FinetuneJob, folder: Path) -> dict[str, DataSet]:
    """All data of a job by their use; what is wrong with any of them is told together."""
    wanted: dict[str, list[Any]] = {
        "train": job.data,
        "replay": list(job.replay),
        "kept": [] if job.adapter is None else list(job.adapter.data),
        "upstream": [job.eval_upstream],
        "downstream": [job.eval_downstream],
    }
    images = None if job.image_root is None else folder / job.image_root
    found: dict[str, DataSet] = {}
    problems: list[str] = []
    for name, files in wanted.items():
        given = [file for file in files if file is not None]
        if not given:
            continue
        with collected(problems):
            found[name] = read_data(given, folder, job.format if name == "train" else "auto", images)
    refuse(problems)
    return found


def _encode(
    encoder: Encoder, data: Mapping[str, DataSet], max_length: int, progress: Progress
) -> dict[str, EncodedSet]:
    encoded = {}
    for name, found in data.items():
        encoder.require_template(found.samples)
        encoded[name] = encode_all(encoder, found.samples, max_length, progress, ", ".join(found.files))
        if encoded[name].dropped:
            progress.note(
                f"{', '.join(found.files)}: {encoded[name].dropped} of {len(found.samples)} samples are longer than "
                f"{max_length} tokens and left out."
            )
    return encoded


def _longest_allowed(job: FinetuneJob, checkpoint: Checkpoint) -> int:
    length = context_length(checkpoint.config)
    prompt = job.adapter.prompt_length if job.adapter is not None else 0
    if length is None:
        return job.max_length
    if prompt >= length:
        raise UsageError(
            f"adapter.tokens: {prompt} vectors before the text leave no room for it in the {length} positions of the "
            "model; take fewer."
        )
    return min(job.max_length, length - prompt)


def _finished(out: Path, inputs: dict[str, Any], overwrite: bool) -> FinetuneReport | None:
    """The report of a finished output if it has the same inputs; None if it is to be replaced.

    Raises:
        UsageError: it has other inputs, and may not be replaced.
    """
    record = read_object(out / RECORD)
    changed = differences(record.get("inputs") or {}, inputs)
    if not changed:
        return FinetuneReport(out, record)
    if overwrite:
        return None
    raise UsageError(
        f"{out}: exists and was made with other settings: {'; '.join(changed)}. "
        "Choose another folder, or add --overwrite."
    )
