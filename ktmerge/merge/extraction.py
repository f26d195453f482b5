"""LoRA extraction: the change of a tuned model as a PEFT adapter, as far as a low rank can hold it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ktmerge.checkpoints.adapted import PREFIX
from ktmerge.checkpoints.adapter import CONFIG, WEIGHTS
from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.files import write_whole
from ktmerge.checkpoints.matrices import matrix_layout
from ktmerge.checkpoints.opening import open_model
from ktmerge.checkpoints.parts import Parts
from ktmerge.checkpoints.staging import Staging
from ktmerge.checkpoints.statistics import Entry, write_tensors
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.checkpoints.reader import Reader
    from ktmerge.merge.spectra import Spectrum

Rule = Literal["rank", "fraction", "energy", "nuclear", "stable", "participation"]


@dataclass(frozen=True)
class ExtractedTensor:
    """A changed tensor of the base.

    Attributes:
        rank: of its factors; 0 where it is not in the adapter.
        size: the smaller of its two dimensions; 0 if it has not two.
        energy: sum of squares of its whole change.
        kept: of the part of it that is in the adapter.
    """

    name: str
    part: str
    rank: int
    size: int
    energy: float
    kept: float


@dataclass
class Extraction:
    """What an extraction wrote, and how much of the change it holds.

    ``share`` of a row or of all is kept / energy: the part of ||tau||^2 that the adapter reproduces.
    """

    out: Path
    tensors: list[ExtractedTensor] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the whole change, what is left out included."""
        return _share(self.tensors)

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Columns, rows and title: one row for each part, layer by layer."""
        groups: dict[tuple[str, bool], list[ExtractedTensor]] = {}
        for one in self.tensors:
            groups.setdefault((one.part, one.rank > 0), []).append(one)
        total = sum(one.energy for one in self.tensors)
        rows = [
            [
                part,
                str(len(group)),
                _span([one.rank for one in group]) if inside else "not in it",
                f"{100 * sum(one.energy for one in group) / total:.3g} %",
                f"{100 * _share(group):.3g} %",
            ]
            for (part, inside), group in groups.items()
        ]
        title = f"{self.out}: {100 * self.share:.3g} % of the change's energy"
        return ["part", "tensors", "rank", "of the change", "kept"], rows, title

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "share": float(f"{self.share:.6g}"),
            "tensors": [
                {"name": one.name, "part": one.part, "rank": one.rank, "size": one.size,
                 "energy": float(f"{one.energy:.6g}"), "share": float(f"{_share([one]):.6g}")}
                for one in self.tensors
            ],
        }  # fmt: skip


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rule: Rule = "rank",
    rank: int = 16,
    share: float = 0.9,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Extraction:
    """Write the change of a tuned model as a PEFT adapter: B = U_r S_r^1/2, A = S_r^1/2 V_r^T of tau = U S V^T.

    Linear layers alone go into it, fused ones as the layers they are, by the names that the base's files have; the
    report says what of the change is in embeddings, norms, biases or stacked experts, and so left out. The change of a
    full fine-tune is of high rank: do not expect a small one to reproduce the tuned model.

    Args:
        base: folder or hub id of the untuned model.
        tuned: of the tuned one.
        out: folder of the adapter.
        rule: how the rank of each layer is chosen; see `ktmerge.merge.spectra.rank_of`.
        rank: of the rule ``rank``.
        share: the fraction or share of the rules that have one.
        overwrite: replace what is there.
        progress: where to report.

    Raises:
        UsageError: no such models, they do not belong together, no linear layer changed, or the output exists.
        KtmergeError: weights cannot be read, or are not finite.
    """
    if rank < 1 or not 0 < share <= 1:
        raise UsageError(
            f"a rank of {rank} and a share of {share} make no adapter; give 1 or more, and above 0 up to 1."
        )
    reference = open_model(str(base), Path.cwd())
    other = open_model(str(tuned), Path.cwd(), reference)
    alignment = align(reference, other, str(tuned))
    alignment.require_complete()
    staging = Staging(Path(out), overwrite)
    factors: dict[str, Tensor] = {}
    found = Extraction(Path(out))
    parts = Parts(reference)
    total = sum(info.nbytes for info in reference.tensors.values())
    with reference.reader() as first, other.reader() as second, progress.task("extract", total, "bytes") as step:
        for name, info in reference.tensors.items():
            if tensor_class(name, info, reference.config) not in ("buffer", "quant"):
                delta = _delta(name, alignment.mapping[name], first, second)
                energy = float((delta.double() ** 2).sum())
                layer = _linear(name, delta.view(info.shape), reference) if energy else None
                size = min(info.shape) if len(info.shape) == 2 else 0
                if layer is not None:
                    spectrum = _leading(layer, rule, rank, share)
                    root = spectrum.values.sqrt()
                    module = PREFIX + name.removesuffix(".weight")
                    factors[f"{module}.lora_A.weight"] = (spectrum.right * root).T.float().contiguous()
                    factors[f"{module}.lora_B.weight"] = (spectrum.left * root).float().contiguous()
                    kept = float((spectrum.values**2).sum())
                    row = ExtractedTensor(name, parts.of(name), root.numel(), size, energy, min(kept, energy))
                    found.tensors.append(row)
                elif energy:
                    found.tensors.append(ExtractedTensor(name, parts.of(name), 0, size, energy, 0.0))
            step.advance(info.nbytes)
    if not factors:
        raise UsageError(f"{tuned}: no linear layer differs from {base}; there is nothing to put into an adapter.")
    _write(staging, factors, _config(str(base), reference, found))
    return found


def _delta(name: str, there: str, base: Reader, tuned: Reader) -> Tensor:
    """tau, flat, fp32."""
    import torch

    delta = tuned.read(there).float().view(-1) - base.read(name).float().view(-1)
    if not bool(torch.isfinite(delta).all()):
        raise KtmergeError(f"'{name}' has values that are NaN or infinite in the base or the tuned model.")
    return delta


def _linear(name: str, delta: Tensor, base: Checkpoint) -> Tensor | None:
    """The delta ``[o, i]`` of a linear layer, or None if the tensor is not the weight of one."""
    info = base.tensors[name]
    if len(info.shape) != 2 or not name.endswith(".weight") or tensor_class(name, info, base.config) != "matrix":
        return None
    layout = matrix_layout(name, info.shape, base.config)
    return delta.T if layout is not None and layout.transposed else delta


def _leading(delta: Tensor, rule: Rule, rank: int, share: float) -> Spectrum:
    import torch

    from ktmerge.merge.kernels.keys import stream_key
    from ktmerge.merge.spectra import one_sided, rank_of, top

    def draw(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(stream_key(0, "extract", "", str(tuple(delta.shape))))
        return torch.rand(count, generator=generator, dtype=torch.float64) - 0.5

    if rule == "rank":
        return top(delta, rank, draw)
    found = one_sided(delta)
    return found.top(max(1, rank_of(found.values, rule, rank, share)))


def _config(base: str, reference: Checkpoint, found: Extraction) -> dict[str, Any]:
    """PEFT's ``adapter_config.json``: alpha = r, so that the product of the factors is the change itself."""
    ranks = {one.name.removesuffix(".weight"): one.rank for one in found.tensors if one.rank}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    architectures = reference.config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    transposed = any(
        layout is not None and layout.transposed
        for one in found.tensors
        if one.rank and (layout := matrix_layout(one.name, reference.tensors[one.name].shape, reference.config))
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if str(first).endswith("ForCausalLM") else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }


def _write(staging: Staging, factors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    entries = [Entry(name, "F32", tuple(one.shape), one.contiguous) for name, one in factors.items()]
    staging.open()
    try:
        staging.require_space(sum(factor.nbytes for factor in factors.values()))
        write_tensors(staging.folder / WEIGHTS, entries, {"format": "pt"})
        write_whole(staging.folder / CONFIG, json.dumps(config, indent=2) + "\n")
        staging.publish()
    finally:
        staging.discard()


def _share(tensors: list[ExtractedTensor]) -> float:
    energy = sum(one.energy for one in tensors)
    return sum(one.kept for one in tensors) / energy if energy else 1.0


def _span(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"
