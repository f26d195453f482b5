"""How many directions a change has, from a few matrices: what tells an adapter's change from that of full tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.opening import open_model

MATRICES = 6
ROWS = 512
"""At most so many rows of a matrix are looked at, from all over it."""
ENERGY = 0.9


def rank_share(base: str | Path, tuned: Mapping[str, str | Path]) -> float | None:
    """The share of a change's directions that hold `ENERGY` of its squared norm, mean over models and matrices.

    Looks at `MATRICES` matrices from all over each model. None if no matrix changed.

    Raises:
        UsageError: a model cannot be opened.
        KtmergeError: weights cannot be read.
    """
    import torch

    reference = open_model(str(base), Path.cwd())
    shares = []
    for name, model in tuned.items():
        other = fit_experts(reference, open_model(str(model), Path.cwd(), reference))
        mapping = align(reference, other, name).mapping
        found = [
            one for one, info in reference.tensors.items() if one in mapping and info.numel
            if len(info.shape) == 2 and tensor_class(one, info, reference.config) == "matrix"
        ]  # fmt: skip
        places = {round(step * (len(found) - 1) / (MATRICES - 1)) for step in range(MATRICES)} if found else set()
        with reference.reader() as theirs, other.reader() as ours:
            for place in sorted(places):
                shape = reference.tensors[found[place]].shape
                values = ours.read(mapping[found[place]]).float() - theirs.read(found[place]).float()
                if not values.isfinite().all():  # which the inspection tells of
                    continue
                rows = torch.linspace(0, shape[0] - 1, min(shape[0], ROWS)).round().long()
                energy = torch.linalg.svdvals(values.view(shape)[rows]).square().cumsum(0)
                if float(energy[-1]) > 0:
                    needed = int((energy < ENERGY * energy[-1]).sum()) + 1
                    shares.append(needed / len(energy))
    return sum(shares) / len(shares) if shares else None
