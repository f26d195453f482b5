"""Looks into a base and its fine-tunes: what they are made of, what differs beside the weights, how far they moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.alignment import Alignment, align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.opening import open_model
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.merge.diagnostics.differences import compare
from ktmerge.merge.diagnostics.inspection import Contents, Inspection, stack_of
from ktmerge.merge.diagnostics.kinds import kind_of
from ktmerge.merge.diagnostics.measures import Movement
from ktmerge.merge.diagnostics.warnings import warnings_of
from ktmerge.progress import SILENT, Progress

_FLOW = ("vision", "audio", "encoder", "connector", "embed", "llm", "norm", "head", "other")
"""Towers and parts in the order in which a model uses them."""


def inspect(
    base: str | Path,
    tuned: Mapping[str, str | Path] | None = None,
    *,
    headers_only: bool = False,
    common: bool = False,
    progress: Progress = SILENT,
) -> Inspection:
    """Look into a base and its fine-tunes.

    Args:
        base: folder or hub id.
        tuned: by name: folders or hub ids, of PEFT adapters too (folded into the base), or ``model+adapter``.
        headers_only: don't read weights; imports neither numpy nor numba.
        common: also say how much the changes of two or more fine-tunes have in common; takes minutes, loads torch.
        progress: where to report.

    Raises:
        UsageError: a folder is not a readable checkpoint, or shares nothing with the base; ``common`` of fewer than
            two models or of headers only.
        KtmergeError: weights cannot be read.
    """
    if common and (headers_only or len(tuned or {}) < 2):
        raise UsageError(
            "what is common shows in the weights of two or more tuned models; name them, without --headers."
        )
    reference = open_model(str(base), Path.cwd())
    parts = Parts(reference)
    opened = {name: open_model(str(model), Path.cwd(), reference) for name, model in (tuned or {}).items()}
    others = {name: fit_experts(reference, other) for name, other in opened.items()}
    alignments = {name: align(reference, other, name) for name, other in others.items()}
    for alignment in alignments.values():
        _require_some(alignment)
    layers = sorted({parts.of(name) for name in reference.tensors}, key=_place)
    found = Inspection(_contents(reference, parts, layers), layers)
    for name, other in others.items():
        found.differences[name] = compare(reference, other, alignments[name])
    mappings = {name: alignment.mapping for name, alignment in alignments.items()}
    if others and not headers_only:
        _measure(reference, parts, others, mappings, found, progress)
        found.warnings += warnings_of(found)
    if common:
        from ktmerge.merge.diagnostics.commonality import commonalities

        matrices = [name for name, what in reference.classes.items() if what == "matrix"]
        for name, common_there in commonalities(reference, matrices, others, mappings, progress):
            _add(found.common, parts.of(name), common_there)
    return found


def _require_some(alignment: Alignment) -> None:
    """Refuse a model of which nothing can be held against the base."""
    if alignment.mapping:
        return
    label = alignment.label
    if alignment.mismatched:
        raise UsageError(
            f"{label}: every tensor it shares with the base has another shape, e.g. {alignment.mismatched[0]}; it is "
            "another size of the same architecture."
        )
    names = [(*alignment.extra, "none"), (*alignment.missing, "none")]
    raise UsageError(
        f"{label}: shares no tensor with the base; it is another architecture (its tensors are called like "
        f"'{names[0][0]}', the base's like '{names[1][0]}')."
    )


def _measure(
    base: Checkpoint,
    parts: Parts,
    others: Mapping[str, Checkpoint],
    mappings: Mapping[str, Mapping[str, str]],
    found: Inspection,
    progress: Progress,
) -> None:
    from ktmerge.merge.diagnostics.survey import survey

    classes = base.classes
    names = [name for name, what in classes.items() if what not in ("buffer", "quant")]
    found.movements = {name: {} for name in others}
    found.matrices = {name: Movement() for name in others}
    found.spreads = {name: {} for name in others}
    found.pairs = {two: {} for two in combinations(others, 2)}
    total = sum(base.tensors[name].numel for name in names)
    for one in survey(base, names, others, mappings, progress):
        part = parts.of(one.name)
        found.broken |= {(model, one.name): count for model, count in one.broken.items()}
        found.changed_by.setdefault(part, []).append(sum(moved.changed > 0 for moved in one.movements.values()))
        for model, moved in one.movements.items():
            _add(found.movements[model], (part, kind_of(one.name)), moved)
            _add(found.spreads[model], part, one.spreads[model])
            if classes[one.name] == "matrix":
                found.matrices[model] += moved
        for models, pair in one.pairs.items():
            _add(found.pairs[models], part, pair)
    for model, cells in found.movements.items():
        found.coverage[model] = sum(moved.elements for moved in cells.values()) / total if total else 1.0


def _contents(checkpoint: Checkpoint, parts: Parts, layers: Iterable[str]) -> dict[str, Contents]:
    contents = {stack_of(layer): Contents() for layer in layers}
    for name, info in checkpoint.tensors.items():
        contents[stack_of(parts.of(name))] += Contents(1, info.numel, info.nbytes, (info.dtype,))
    return contents


def _place(layer: str) -> tuple[int, int, int, str]:
    """Where a layer stands in the order of use: what comes without a number in a tower comes first, its head last."""
    tower, _, rest = layer.partition(".")
    number = layer.partition("[")[2].rstrip("]")
    inner = 1 if number else (2 if rest else 0)
    return (_FLOW.index(tower) if tower in _FLOW else len(_FLOW), inner, int(number or 0), layer)


def _add(totals: dict[Any, Any], key: Any, value: Any) -> None:
    totals[key] = totals[key] + value if key in totals else value
