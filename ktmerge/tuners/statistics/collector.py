"""One model, examples one after the other: hooks, reservoirs and Fisher information, their state, and their files."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.parts import Parts
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
from ktmerge.tuners.statistics.inputs import Inputs, stem
from ktmerge.tuners.statistics.places import Place, find_places, find_stacks
from ktmerge.tuners.statistics.scales import Scales

_STATE, _SUMS, _LEADERS = "reservoirs.safetensors", "sums.safetensors", "leaders.json"
_SCALES = "scales.safetensors"
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
        self._places = find_places(model, checkpoint)
        classes = {
            name: tensor_class(name, info, checkpoint.config)
            for name, info in checkpoint.tensors.items()
            if name in self._places
        }
        matrices = {name for name, one in classes.items() if one == "matrix"}
        maps = {self._places[name].live: name for name in matrices if len(self._places[name].shape) == 2}
        stacks = list(find_stacks(model, self._places))
        parts = Parts(checkpoint)
        self._image = _image_token(checkpoint.config)
        seeing = {name for name in matrices if self._image is not None and parts.of(name).startswith(_SEEING)}
        self._inputs = Inputs(model, maps, stacks, seeing, scratch, job.tokens, job.seed)
        vectors = {self._places[name].live: name for name, one in classes.items() if one == "vector"}
        self._scales = Scales(model, vectors)
        live = {place.live for place in self._places.values()}
        self._fisher = None if job.fisher == "none" else Fisher(model, live)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Take all hooks off the model."""
        self._inputs.close()
        self._scales.close()
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
        save_file(self._scales.state() or {"none": torch.zeros(0)}, folder / _SCALES)
        (folder / _LEADERS).write_text(json.dumps(self._inputs.leaders), encoding="utf-8")
        if self._fisher is not None:
            save_file({**self._fisher.sums, "examples ": torch.tensor(self._fisher.examples)}, folder / _SUMS)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = {name: values for name, values in load_file(folder / _STATE).items() if "|" in name}
        self._scales.restore({name: one for name, one in load_file(folder / _SCALES).items() if "|" in name})
        self._inputs.restore(state, json.loads((folder / _LEADERS).read_text(encoding="utf-8")))
        if self._fisher is not None:
            sums = load_file(folder / _SUMS)
            self._fisher.restore(sums, int(sums.pop("examples ")))

    def write(self, folder: Path, **facts: Any) -> None:
        """Write the statistics into ``folder``.

        Raises:
            KtmergeError: something is not finite, or cannot be written.
        """
        reservoirs = self._inputs.reservoirs
        groups: dict[str, list[str]] = {}
        for name in sorted(reservoirs):
            groups.setdefault(stem(name), []).append(name)
        entries = [entry for name, members in groups.items() for entry in self._entries(name, members)]
        scales = self._scales.tokens()
        entries += [self._scale(name) for name in scales]
        files = {INPUTS: write_tensors(folder / INPUTS, entries)} if entries else {}
        fisher = None
        if self._fisher is not None:
            norm = self._fisher.norm()
            if norm != norm or norm == float("inf"):
                raise KtmergeError("the Fisher information is not finite; the model's gradients overflow on this data.")
            diagonals = [
                Entry(name, "F32", place.shape, partial(_part, self._fisher, place))
                for name, place in self._places.items()
                if place.live in self._fisher.sums
            ]
            files[FISHER] = write_tensors(folder / FISHER, diagonals)
            fisher = {"kind": self._job.fisher, "examples": self._fisher.examples, "norm": norm}
        counts = {name: sum(reservoirs[one].count for one in members) for name, members in groups.items()}
        write_record(
            folder, model=told_model(self._checkpoint), samples=self._inputs.samples(), fisher=fisher, files=files,
            tokens=counts, scales=scales, **facts,
        )  # fmt: skip

    def _entries(self, name: str, members: list[str]) -> list[Entry]:
        """What is stored of one input: of stacked experts, those of all of them, in their order."""
        found = [self._inputs.reservoirs[member] for member in members]
        for one in found:
            if not bool(torch.isfinite(one.square).all()):
                raise KtmergeError(f"tensor '{name}': its inputs are not finite; the model overflows on this data.")
        width, experts = found[0].width, self._experts(name) if "#" in members[0] else None
        numbers = [int(member.partition("#")[2].partition(":")[0]) for member in members] if experts else [0]
        lead = () if experts is None else (experts,)
        kept = max(one.kept for one in found)

        def sample() -> Tensor:
            """Of an expert with fewer tokens the rest is 0 and its rows are larger: X^T X / tokens stays its own."""
            rows = torch.zeros(experts or 1, kept, width)
            for number, one in zip(numbers, found, strict=True):
                rows[number, : one.kept] = one.sample() * (kept / one.kept) ** 0.5
            return rows if experts is not None else rows[0]

        def mean(what: str) -> Tensor:
            means = torch.zeros(experts or 1, width)
            for number, one in zip(numbers, found, strict=True):
                means[number] = (getattr(one, what) / one.count).float()
            return means if experts is not None else means[0]

        half = self._job.dtype == "float16" and float(sample().abs().max()) <= _HALF
        return [
            Entry(f"{SAMPLE}/{name}", "F16" if half else "F32", (*lead, kept, width), lambda: _cast(sample(), half)),
            Entry(f"{MEAN_SQUARE}/{name}", "F32", (*lead, width), partial(mean, "square")),
            Entry(f"{MEAN_ABSOLUTE}/{name}", "F32", (*lead, width), partial(mean, "absolute")),
        ]

    def _scale(self, name: str) -> Entry:
        """What is stored of what one norm scales."""
        square = self._scales.mean_square(name)
        if not bool(torch.isfinite(square).all()):
            raise KtmergeError(f"tensor '{name}': what it scales is not finite; the model overflows on this data.")
        return Entry(f"{MEAN_SQUARE}/{name}", "F32", tuple(square.shape), lambda: square)

    def _experts(self, name: str) -> int:
        return self._places[name.removesuffix(":image")].shape[0]


def _cast(values: Tensor, half: bool) -> Tensor:
    return values.half() if half else values


def _part(fisher: Fisher, place: Place) -> Tensor:
    """The Fisher information of one of the checkpoint's tensors."""
    size = math.prod(place.shape)
    return fisher.diagonal(place.live).reshape(-1)[place.start : place.start + size].reshape(place.shape)


def _image_token(config: Mapping[str, Any]) -> int | None:
    """The token that stands for a piece of an image, of a model that sees."""
    found = next((config[key] for key in ("image_token_id", "image_token_index") if key in config), None)
    return found if type(found) is int else None
