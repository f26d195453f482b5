"""A folder of measured statistics: what a model's linear maps were given, and how much each weight matters, on data.

``statistics.json`` says of which model and data they are, and which tensor has which sample; ``inputs.safetensors``
holds the samples, ``fisher.safetensors`` the diagonal of the Fisher information. Importing it loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.header import FilePlan, TensorInfo, build_header, read_header
from ktmerge.checkpoints.reader import TensorReader
from ktmerge.checkpoints.regular import read_regular
from ktmerge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.checkpoints.header import FileStamp

RECORD = "statistics.json"
INPUTS = "inputs.safetensors"
FISHER = "fisher.safetensors"
SAMPLE, MEAN_SQUARE, MEAN_ABSOLUTE = "sample", "mean_square", "mean_absolute"
"""What is stored of each distinct input, as ``<what>/<input>``: rows ``[tokens, i]``, and means over all tokens."""
_EDGE = 4096
"""Bytes looked at where a tensor begins and where it ends, for a fingerprint."""


@dataclass(frozen=True)
class Statistics:
    """The index of one folder of statistics; no numbers are read.

    Attributes:
        root: the folder.
        document: ``statistics.json``.
        samples: names of the samples of every measured linear map, by the model's tensor name; of a model that sees
            images there is one of text tokens and one of image tokens.
        tensors: header entries: of ``inputs.safetensors`` by name, of ``fisher.safetensors`` as ``fisher/<tensor>``.
        stamps: of the weight files.
        digest: sha256 of ``statistics.json``, which has those of the other files in it.
        scales: the norms' weights of which it was measured what they scale; None if that was not done.
    """

    root: Path
    document: Mapping[str, Any]
    samples: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, TensorInfo]
    stamps: Mapping[str, FileStamp]
    digest: str
    scales: frozenset[str] | None = None

    @classmethod
    def open(cls, root: Path) -> Statistics:
        """Read record and headers of the folder ``root``.

        Raises:
            UsageError: it is no such folder, or does not hold together.
        """
        try:
            text = read_regular(root / RECORD)
        except OSError:
            raise UsageError(f"{root}: holds no statistics (no {RECORD}); 'ktmerge stats' makes them.") from None
        try:
            document = json.loads(text)
            if document["ktmerge_statistics"] != 1:
                raise UsageError(f"{root / RECORD}: was written by another version of ktmerge; make it again.")
            samples = {name: tuple(map(str, found)) for name, found in document["inputs"].items()}
            files = list(document["files"])
            float((document["fisher"] or {"norm": 0.0})["norm"])
            str(document["model"]["headers"]), str(document["model"]["fingerprint"])
            scales = None if document.get("scales") is None else frozenset(map(str, document["scales"]))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise UsageError(f"{root / RECORD}: is not a record of statistics; make them again.") from None
        tensors: dict[str, TensorInfo] = {}
        stamps: dict[str, FileStamp] = {}
        for file in (name for name in (INPUTS, FISHER) if name in files):
            header = read_header(root / file, file)
            stamps[file] = header.stamp
            tensors |= {f"fisher/{one.name}" if file == FISHER else one.name: one for one in header.tensors}
        for name, found in samples.items():
            if not found or any(f"{SAMPLE}/{one}" not in tensors for one in found):
                raise UsageError(f"{root}: {INPUTS} lacks the sample of '{name}'; make the statistics again.")
        for name in sorted(scales or ()):
            if f"{MEAN_SQUARE}/{name}" not in tensors:
                raise UsageError(f"{root}: {INPUTS} lacks what '{name}' scales; make the statistics again.")
        return cls(root, document, samples, tensors, stamps, hashlib.sha256(text).hexdigest(), scales)

    def reader(self) -> TensorReader:
        """Open the numbers for reading; use as a context manager."""
        return TensorReader(self.root, self.tensors, self.stamps)

    @property
    def has_fisher(self) -> bool:
        """Whether the Fisher information was measured."""
        return self.document["fisher"] is not None

    @property
    def fisher_norm(self) -> float:
        """L2 norm of the diagonal Fisher information over all tensors; 0 if it was not measured."""
        return float((self.document["fisher"] or {"norm": 0.0})["norm"])

    def scales_of(self, tensor: str) -> TensorInfo | None:
        """Where the mean squares of what one of the model's norms scales are."""
        return self.tensors[f"{MEAN_SQUARE}/{tensor}"] if tensor in (self.scales or ()) else None

    def fisher_of(self, tensor: str) -> TensorInfo | None:
        """Where the Fisher information of one of the model's tensors is."""
        return self.tensors.get(f"fisher/{tensor}")

    def is_of(self, model: Checkpoint) -> bool:
        """Whether they were measured in this very model, as far as its fingerprint tells."""
        told = self.document["model"]
        return bool(told["headers"] == model.header_digest() and told["fingerprint"] == fingerprint(model))


def fingerprint(model: Checkpoint) -> str:
    """sha256 over name, type, shape, first and last bytes of every tensor: tells a base from its fine-tunes in no time.

    Raises:
        KtmergeError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with model.reader() as reader:
        for name in sorted(model.tensors):
            info = model.tensors[name]
            digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
            width = max(1, BITS[info.dtype] // 8)
            if BITS[info.dtype] % 8 or not info.numel:
                continue
            count = min(info.numel, _EDGE // width)
            for start in dict.fromkeys((0, info.numel - count)):
                edge = bytearray(count * width)
                reader.read_into(name, start, memoryview(edge))
                digest.update(edge)
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """One tensor to be stored: ``load`` makes it when its turn comes, contiguous, of this type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def write_tensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] = MappingProxyType({})) -> str:
    """Write a safetensors file tensor by tensor, in name order; return its sha256.

    Raises:
        KtmergeError: it cannot be written.
    """
    import torch

    ordered = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}
    header, placed = build_header(FilePlan(path.name, list(ordered.values()), metadata))
    digest = hashlib.sha256(header)
    with clear_os_errors(path), path.open("wb") as stream:
        stream.write(header)
        for info in placed:
            data = ordered[info.name].load().contiguous().reshape(-1).view(torch.uint8).numpy().data
            stream.write(data)
            digest.update(data)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def write_record(
    root: Path,
    *,
    model: Mapping[str, str],
    samples: Mapping[str, Iterable[str]],
    fisher: Mapping[str, Any] | None,
    files: Mapping[str, str],
    **facts: Any,
) -> None:
    """Write ``statistics.json``.

    Args:
        root: the folder, which has the other files already.
        model: ``headers`` and ``fingerprint`` of what was measured.
        samples: names of the samples by tensor.
        fisher: ``norm``, and what it was measured with; None if it was not.
        files: sha256 of the other files by name.
        facts: further entries.

    Raises:
        KtmergeError: it cannot be written.
    """
    if fisher is not None and not math.isfinite(fisher["norm"]):
        raise ValueError("the Fisher information is not finite")
    inputs = {name: list(found) for name, found in sorted(samples.items())}
    document = {"ktmerge_statistics": 1, "model": dict(model), **facts, "fisher": fisher, "files": dict(files)}
    text = json.dumps({**document, "inputs": inputs}, indent=1, ensure_ascii=False) + "\n"
    with clear_os_errors(root), (root / RECORD).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def told_model(model: Checkpoint) -> dict[str, str]:
    """How a record names the model it is of."""
    return {"headers": model.header_digest(), "fingerprint": fingerprint(model)}
