"""What a fine-tune leaves on record: the file ``ktmerge-run.json``, and what the caller gets back."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge import __version__
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.files import file_digest
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.data import DataSet
from ktmerge.tuners.encode import EncodedSet
from ktmerge.tuners.partial import READING

RECORD = "ktmerge-run.json"
LOSSES = "ktmerge-losses.png"
SAMPLES = "samples"
"""Key of those lines of a log that hold what the model wrote."""
_CONFIGURATIONS = ("config.json", "preprocessor_config.json", "processor_config.json")
"""What says how a base computes, and what it makes of an image before that."""
_NO_EFFECT = frozenset(
    {"data", "image_root", "eval_upstream", "eval_downstream", "replay", "fisher"}
    | {"log_every", "save_every", "show_samples", "tensorboard"}
    | {"activation_checkpointing", "offload_optimizer", "optimizer_in_backward", "packing"}
)
"""Settings that do not change the result, or not by their name: files count by their content, and what saves memory
changes no more than the order in which numbers are added."""


@dataclass(frozen=True)
class FinetuneReport:
    """One finished fine-tune.

    Attributes:
        out: the tuned checkpoint.
        record: what its ``ktmerge-run.json`` says.
    """

    out: Path
    record: dict[str, Any]

    @property
    def losses(self) -> dict[str, Any]:
        """``first`` and ``last`` training loss, and the evaluations as a list with ``step`` and a loss per set."""
        return dict(self.record["losses"])

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), **self.record}

    def pairs(self) -> dict[str, str]:
        """The main facts as text, for a terminal."""
        counts, run, losses = self.record["counts"]["train"], self.record["run"], self.record["losses"]
        dropped = f", {counts['dropped']} too long and dropped" if counts["dropped"] else ""
        shown = {
            "tuned model": str(self.out),
            "samples": f"{counts['samples']}{dropped}; {counts['tokens']} tokens, {counts['trained_tokens']} trained",
            "steps": f"{run['steps']}{_shown_stop(run)} in {run['seconds']:.0f} s, "
            f"{run['tokens_per_second']:.0f} tokens/s, {run['device']}, {run['precision']}",
            **_shown_part(run),
            "training loss": f"{losses['first']:.4f} -> {losses['last']:.4f}",
        }
        for name in ("upstream", "downstream"):
            values = [one[name] for one in losses["evaluations"] if name in one]
            if values:
                shown[f"{name} loss"] = f"{values[0]:.4f} -> {self._of_result(name, values[-1]):.4f}"
        return shown

    def _of_result(self, name: str, last: float) -> float:
        """The loss on an evaluation set of what was saved, which need not be the weights of the last step."""
        run, evaluations = self.record["run"], self.record["losses"]["evaluations"]
        if "average" in run and self.record["job"]["export"] != "last":
            return float(run["average"].get("losses", {}).get(name, last))
        kept = [one[name] for one in evaluations if one["step"] == run.get("result_of_step") and name in one]
        return float(kept[-1]) if kept else last


def _shown_stop(run: dict[str, Any]) -> str:
    """Which step the result is of, if not the last."""
    return f" (result: step {run['result_of_step']})" if "result_of_step" in run else ""


def _shown_part(run: dict[str, Any]) -> dict[str, str]:
    """What was trained, if not everything; records of earlier versions do not say."""
    trained = run.get("trained")
    if not trained or trained["parameters"] == trained["of"]:
        return {}
    parts = ", ".join(one["part"] for one in trained["parts"] if one["trained"])
    return {"trained": f"{parts}: {trained['parameters']:,} of {trained['of']:,} parameters"}


def inputs_of(
    job: FinetuneJob,
    base: Checkpoint,
    base_digest: str,
    data: Mapping[str, DataSet],
    encoded: Mapping[str, EncodedSet],
) -> dict[str, Any]:
    """All that decides the result; two runs with equal inputs, and equal settings of memory, on one machine give the
    same bytes."""
    told = job.model_dump(mode="json", exclude=set(_NO_EFFECT))
    if job.format == "auto":
        del told["format"]  # the files decide then
    if not job.replay:  # how a step is split into batches decides nothing then
        told["samples a step"] = told.pop("batch_size") * told.pop("gradient_accumulation")
    return {
        "job": told,
        "base": {"header": base.header_digest(), "content": base_digest},
        **{_INPUT_NAMES[name]: list(found.digests) for name, found in data.items()},
        READING: {
            "configuration of the base": _configuration(base),
            **{f"tokenisation of the {_INPUT_NAMES[name]}": found.digest for name, found in encoded.items()},
        },
    }


def _configuration(base: Checkpoint) -> str:
    """One sha256 over the files that are not weights and decide what they compute."""
    files = [base.root / name for name in _CONFIGURATIONS]
    told = [f"{file.name} {file_digest(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


_INPUT_NAMES = {
    "train": "training data",
    "replay": "replay data",
    "kept": "upstream data of the adapter",
    "upstream": "upstream data",
    "downstream": "downstream data",
}


def record_of(
    job: FinetuneJob,
    base: Path,
    inputs: dict[str, Any],
    data: dict[str, DataSet],
    encoded: dict[str, EncodedSet],
    run: dict[str, Any],
    log: Path,
) -> dict[str, Any]:
    """The record of a finished run; holds no path of this machine."""
    return {
        "ktmerge": __version__,
        "job": _without_folders(job),
        "base": reference_of(base),
        "inputs": inputs,
        "counts": {
            name: {
                "files": [Path(file).name for file in data[name].files],
                "formats": list(data[name].formats),
                "samples": len(found.samples),
                "dropped": found.dropped,
                "tokens": found.tokens,
                "trained_tokens": found.trained_tokens,
            }
            for name, found in encoded.items()
        },
        "run": run,
        "losses": _losses(log),
        "samples": _samples(log),
        "versions": _versions(),
    }


def reference_of(base: Path) -> str:
    """How to name a base elsewhere: its hub id with the revision if it comes from the hub's cache, else its folder."""
    repository = base.parent.parent.name
    if base.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{base.name}"
    return base.resolve().name


def _without_folders(job: FinetuneJob) -> dict[str, Any]:
    """The job with absolute paths cut to the file name."""
    document = job.model_dump(mode="json")
    for key in ("eval_upstream", "eval_downstream", "fisher", "image_root"):
        document[key] = document[key] and _portable(document[key])
    for key in ("data", "replay"):
        document[key] = [_portable(file) for file in document[key]]
    for key in ("data", "experts") if document["adapter"] is not None else ():
        document["adapter"][key] = [_portable(file) for file in document["adapter"][key]]
    return document


def _portable(file: str) -> str:
    return Path(file).name if Path(file).is_absolute() else file


def draw_losses(log: Path, name: str) -> bytes:
    """The losses of a log as a PNG."""
    from ktmerge.drawing import drawn, loss_figure, to_file

    with drawn():
        figure = loss_figure({name: log_lines(log)})
        assert figure is not None  # the last step is always logged
        return to_file(figure, "png")


def _samples(log: Path) -> list[dict[str, Any]]:
    """What the model wrote at every evaluation."""
    return [{"step": line["step"], **one} for line in log_lines(log) for one in line.get(SAMPLES, [])]


def log_lines(log: Path) -> list[dict[str, Any]]:
    """The records of a log, in order."""
    # split("\n"), not splitlines(): what a model says may hold other line separators of Unicode
    return [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n") if line]


def _losses(log: Path) -> dict[str, Any]:
    lines = log_lines(log)
    training = [line["loss"] for line in lines if "loss" in line]
    evaluations = [
        {"step": line["step"], **{key[5:-5]: value for key, value in line.items() if key.startswith("eval_")}}
        for line in lines
        if any(key.startswith("eval_") for key in line)
    ]
    return {"first": training[0], "last": training[-1], "evaluations": evaluations}


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
