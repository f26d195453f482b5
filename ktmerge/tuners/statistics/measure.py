"""The way of one measurement: read and check everything, work in ``<out>.partial``, publish ``out`` in one step."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from ktmerge import __version__
from ktmerge.checkpoints.adapter import is_adapter, open_adapter
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.files import refuse_overlap
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.checkpoints.staging import Staging, refuse_output
from ktmerge.checkpoints.statistics import RECORD, told_model
from ktmerge.errors import KtmergeError, UsageError, first_line
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.schema import Statistics
from ktmerge.tuners.encode import Encoder
from ktmerge.tuners.finished import is_finished
from ktmerge.tuners.partial import READING, Partial, Saved, as_object, read_object
from ktmerge.tuners.statistics.examples import Examples, read_examples, text_example

if TYPE_CHECKING:
    from ktmerge.tuners.statistics.collector import Collector

SAVE_SECONDS = 20.0
"""Least time between two saved states; and a save may take a tenth of the time at most."""
_NO_EFFECT = {"folder", "data", "images"}
"""Settings that do not change the result by their name: files count by their content."""


@dataclass(frozen=True)
class StatisticsReport:
    """One finished measurement.

    Attributes:
        out: the folder.
        record: what its ``statistics.json`` says.
    """

    out: Path
    record: dict[str, Any]

    def pairs(self) -> dict[str, str]:
        """The main facts as text, for a terminal."""
        tokens: dict[str, int] = self.record["tokens"]
        inputs = [name for name in tokens if not name.endswith(":image")]
        fisher = self.record["fisher"]
        shown = {
            "statistics": str(self.out),
            "examples": str(self.record["examples"]),
            "inputs": f"{len({name.removesuffix(':image') for name in tokens})} distinct, of "
            f"{len(self.record['inputs'])} linear maps; {max((tokens[one] for one in inputs), default=0)} tokens seen",
        }
        if fisher is not None:
            shown["Fisher information"] = (
                f"{fisher['kind']}, of {fisher['examples']} examples, norm {fisher['norm']:.4g}"
            )
        return shown

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), **self.record}


def measure(
    job: Statistics,
    model: Path,
    out: Path,
    *,
    folder: Path,
    adapter: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> StatisticsReport:
    """Measure the checkpoint ``model`` on a job's data, into the folder ``out``.

    Args:
        job: what to do, its data named.
        model: folder of the model.
        out: the statistics; appear whole or not at all.
        folder: where the job's relative paths start.
        adapter: folder of a PEFT adapter to fold into the model first, in memory.
        device: auto, cpu or cuda.
        overwrite: replace ``out`` in one step at the end; without ``resume``, start afresh.
        resume: go on with ``<out>.partial`` if it is there, to the very bytes an unbroken run gives; keep ``out`` if it
            is already what the job asks for.
        progress: told the examples.

    Raises:
        UsageError: wrong data or model, or an output that neither flag allows to touch.
        KtmergeError: out of memory, a full disk, a model that gives no finite numbers.
    """
    refuse_overlap(out, [model] if adapter is None else [model, adapter])
    refuse_output(out, overwrite or (resume and (out / RECORD).exists()))
    checkpoint = _open(model)
    measured = checkpoint if adapter is None else open_adapter(adapter, checkpoint)
    if job.self_generate is not None:
        encoder: Encoder | None = Encoder.load(model)
        examples = Examples([], {"self_generate": job.self_generate})
    else:
        encoder, examples = None, read_examples(job, checkpoint, folder, progress)
    inputs = {
        "job": job.model_copy(update={"folder": None}).model_dump(mode="json", exclude=_NO_EFFECT),
        "model": told_model(measured),
        "source": dict(examples.source),
        READING: {"tokenisation of the data": examples.tokens},
    }
    if resume and (out / RECORD).exists():
        finished = _finished(out, inputs, overwrite)
        if finished is not None:
            Partial(out, inputs).discard()
            progress.note(f"{out}: is already what the job asks for.")
            return finished
    with Partial(out, inputs) as working:
        saved = working.open(resume=resume, overwrite=overwrite)
        _collect(job, checkpoint, measured, examples, encoder, working, saved, inputs, out, device, progress)
        working.finish()
    return StatisticsReport(out, read_object(out / RECORD))


def _collect(
    job: Statistics,
    checkpoint: Checkpoint,
    measured: Checkpoint,
    examples: Examples,
    encoder: Encoder | None,
    working: Partial,
    saved: Saved | None,
    inputs: dict[str, Any],
    out: Path,
    device: str,
    progress: Progress,
) -> None:
    from ktmerge.tuners.machine import is_disk_trouble, is_out_of_memory
    from ktmerge.tuners.model import load_model
    from ktmerge.tuners.statistics.collector import Collector
    from ktmerge.tuners.statistics.folded import fold_into
    from ktmerge.tuners.statistics.generated import generated

    try:
        with quiet_transformers():
            model = load_model(checkpoint, progress, sees="vision_config" in checkpoint.config)
            if measured is not checkpoint:
                fold_into(model, checkpoint, measured)
            model.to(_device(device)).eval()
            if encoder is not None:
                texts = generated(job, model, encoder, working.folder / "texts.json", progress)
                examples = Examples([partial(text_example, one) for one in texts], examples.source)
            collector = Collector(model, measured, job, working.folder)
            with progress.task(f"measuring {measured.root.name}", len(examples), "items") as step:
                step.advance(saved.step if saved else 0)
                _observe(collector, examples, working, saved, step.advance)
            collector.close()
        _publish(collector, out, len(examples), inputs, job)
    except (KtmergeError, UsageError):
        raise
    except Exception as error:  # the libraries have no common type for either failure
        if is_out_of_memory(error):
            raise KtmergeError("out of memory while measuring; give shorter samples (max_length).") from error
        if is_disk_trouble(error):
            raise KtmergeError(
                f"{working.folder}: cannot be written ({first_line(error)}); free some space and add --resume."
            ) from error
        raise


def _observe(collector: Collector, examples: Examples, working: Partial, saved: Saved | None, advance: Any) -> None:
    if saved is not None:
        collector.restore(saved.path)
    last, cost = monotonic(), 0.0
    for number in range(saved.step if saved else 0, len(examples)):
        collector.observe(number, examples[number])
        advance()
        if monotonic() - last < max(SAVE_SECONDS, 9 * cost):
            continue
        began, older = monotonic(), saved
        target = working.folder / f"checkpoint-{number + 1}"
        collector.save(target)
        working.seal(target, number + 1, 0.0)
        saved = Saved(target, number + 1, 0.0)
        if older is not None:
            shutil.rmtree(older.path, ignore_errors=True)
        last, cost = monotonic(), monotonic() - began


def _publish(collector: Collector, out: Path, examples: int, inputs: dict[str, Any], job: Statistics) -> None:
    staging = Staging(out, overwrite=True)
    staging.open()
    try:
        collector.write(
            staging.folder,
            examples=examples,
            made={"ktmerge": __version__, **inputs, "files": [Path(file).name for file in job.data]},
        )
        staging.publish()
    finally:
        staging.discard()


def _open(model: Path) -> Checkpoint:
    if is_adapter(model):
        raise UsageError(f"{model}: is an adapter; name its model, too: MODEL+{model}.")
    checkpoint = Checkpoint.open(model)
    packed = next((n for n, i in checkpoint.tensors.items() if tensor_class(n, i, checkpoint.config) == "quant"), None)
    if packed is not None:
        raise UsageError(f"{model}: is quantised ('{packed}'); measure the model it was made from.")
    return checkpoint


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise UsageError(f"device '{device}': choose auto or cpu, or cuda where there is such a device.")
    return device


def _finished(out: Path, inputs: dict[str, Any], overwrite: bool) -> StatisticsReport | None:
    record = read_object(out / RECORD)
    before = {key: as_object(record.get("made")).get(key) for key in inputs}
    wanted, files = json.loads(json.dumps(inputs)), as_object(record.get("files"))
    return StatisticsReport(out, record) if is_finished(out, before, wanted, files, overwrite=overwrite) else None
