"""One model, examples one after the other: hooks, reservoirs and Fisher information, their state, and their files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktmerge.checkpoints import Checkpoint, Parts, align, tensor_class
from ktmerge.checkpoints.live import as_checkpoint
from ktmerge.checkpoints.statistics import (
    FISHER,
    INPUTS,
    MEAN_ABSOLUTE,
    MEAN_SQUARE,
    SAMPLE,
    Entry,
    told_model,
    write_record,
    write_tensors,
)
from ktmerge.errors import KtmergeError
from ktmerge.recipes.schema import Statistics
from ktmerge.tuners.statistics.examples import Example
from ktmerge.tuners.statistics.fisher import Fisher, drawn, loglikelihood
from ktmerge.tuners.statistics.inputs import Inputs
from ktmerge.tuners.statistics.reservoir import Reservoir

_STATE, _SUMS, _LEADERS = "reservoirs.safetensors", "sums.safetensors", "leaders.json"
_SEEING = ("vision", "connector")
_HALF = float(torch.finfo(torch.float16).max)


class Collector:
    """Runs a model on examples, each alone: no padding, and the same numbers whatever else is measured.

    Args:
        model: of transformers, fp32; put into evaluation mode. `close` takes off what is put on it.
        checkpoint: the folder it was loaded from, whose tensor names count.
        job: what is to be measured.
        scratch: folder for what is kept meanwhile.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, job: Statistics, scratch: Path) -> None:
        self._model, self._checkpoint, self._job = model.eval(), checkpoint, job
        found = align(checkpoint, as_checkpoint(model.state_dict(), checkpoint), "the model").mapping
        self._names = {live: stored for stored, live in found.items()}
        infos = checkpoint.tensors
        maps = {
            live: stored
            for live, stored in self._names.items()
            if tensor_class(stored, infos[stored], checkpoint.config) == "matrix"
        }
        parts = Parts(checkpoint)
        self._image = _image_token(checkpoint.config)
        seeing = {name for name in maps.values() if self._image is not None and parts.of(name).startswith(_SEEING)}
        self._inputs = Inputs(model, maps, seeing, scratch, job.tokens, job.seed)
        self._fisher = None if job.fisher == "none" else Fisher(model, self._names)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Take all hooks off the model."""
        self._inputs.close()
        if self._fisher is not None:
            self._fisher.close()

    def observe(self, number: int, example: Example) -> None:
        """Run the model on one example; ``number`` decides, with the seed, which of its tokens are kept.

        Raises:
            KtmergeError: the model gives no finite numbers.
        """
        device = self._model.device
        keywords = {name: values.to(device) for name, values in example.keywords.items()}
        ids = keywords["input_ids"][0]
        places = example.answers.nonzero()[:, 0].to(device)
        places = places[places > 0]
        wanted = {"logits_to_keep": places - 1 if self._fisher is not None else 1} if self._keeps else {}
        self._inputs.begin(number, (ids == self._image).cpu() if self._image is not None else torch.zeros(len(ids)) > 0)
        with torch.set_grad_enabled(self._fisher is not None):
            logits = self._model(**keywords, **wanted, use_cache=False).logits[0]
        self._inputs.end()
        if self._fisher is None:
            return
        logits = logits if self._keeps else logits[places - 1]
        answers = ids[places] if self._job.fisher == "empirical" else drawn(logits, self._job.seed, number)
        likelihood = loglikelihood(logits, answers)
        if not bool(torch.isfinite(likelihood)):
            raise KtmergeError(
                f"example {number + 1}: the model's log-likelihood is {float(likelihood)}, not a number."
            )
        self._fisher.add(likelihood)

    def save(self, folder: Path) -> None:
        """Write everything to go on from, beside the scratch files, into ``folder``."""
        folder.mkdir()
        save_file(self._inputs.state() or {"none": torch.zeros(0)}, folder / _STATE)
        (folder / _LEADERS).write_text(json.dumps(self._inputs.leaders), encoding="utf-8")
        if self._fisher is not None:
            save_file({**self._fisher.sums, "examples ": torch.tensor(self._fisher.examples)}, folder / _SUMS)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = {name: values for name, values in load_file(folder / _STATE).items() if "|" in name}
        self._inputs.restore(state, json.loads((folder / _LEADERS).read_text(encoding="utf-8")))
        if self._fisher is not None:
            sums = load_file(folder / _SUMS)
            self._fisher.restore(sums, int(sums.pop("examples ")))

    def write(self, folder: Path, **facts: Any) -> dict[str, Any]:
        """Write the statistics into ``folder``; return a few numbers about them.

        Raises:
            KtmergeError: something is not finite, or cannot be written.
        """
        reservoirs = self._inputs.reservoirs
        entries = [entry for name, one in reservoirs.items() for entry in self._entries(name, one)]
        files = {INPUTS: write_tensors(folder / INPUTS, entries)} if entries else {}
        fisher = None
        if self._fisher is not None:
            norm = self._fisher.norm()
            if norm != norm or norm == float("inf"):
                raise KtmergeError("the Fisher information is not finite; the model's gradients overflow on this data.")
            sums = self._fisher.sums
            diagonals = [
                Entry(name, "F32", tuple(sums[name].shape), partial(self._fisher.diagonal, name)) for name in sums
            ]
            files[FISHER] = write_tensors(folder / FISHER, diagonals)
            fisher = {"kind": self._job.fisher, "examples": self._fisher.examples, "norm": norm}
        counts = {name: one.count for name, one in sorted(reservoirs.items())}
        write_record(
            folder, model=told_model(self._checkpoint), samples=self._inputs.samples(), fisher=fisher, files=files,
            tokens=counts, **facts,
        )  # fmt: skip
        images = [name for name in counts if name.endswith(":image")]
        return {"inputs": len(counts) - len(images), "maps": len(self._inputs.leaders), "fisher": fisher}

    def _entries(self, name: str, reservoir: Reservoir) -> list[Entry]:
        shape = (reservoir.kept, reservoir.width)
        means = {MEAN_SQUARE: reservoir.square, MEAN_ABSOLUTE: reservoir.absolute}
        if not all(bool(torch.isfinite(values).all()) for values in means.values()):
            raise KtmergeError(f"tensor '{name}': its inputs are not finite; the model overflows on this data.")
        half = self._job.dtype == "float16" and float(reservoir.sample().abs().max()) <= _HALF
        load = (lambda: reservoir.sample().half()) if half else reservoir.sample
        return [
            Entry(f"{SAMPLE}/{name}", "F16" if half else "F32", shape, load),
            *(
                Entry(f"{what}/{name}", "F32", shape[1:], partial(_mean, values, reservoir.count))
                for what, values in means.items()
            ),
        ]


def _mean(values: Tensor, count: int) -> Tensor:
    return (values / max(1, count)).float()


def _image_token(config: Mapping[str, Any]) -> int | None:
    """The token that stands for a piece of an image, of a model that sees."""
    found = next((config[key] for key in ("image_token_id", "image_token_index") if key in config), None)
    return found if type(found) is int else None
