"""How much of what several tuned models changed is common to them, layer by layer: the coherence of their changes.

One pass over the linear maps, a decomposition each: minutes for a model of half a billion weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.matrices import MatrixLayout, matrix_layout
from ktmerge.checkpoints.reader import Reader
from ktmerge.merge.diagnostics.measures import Effective, Sums
from ktmerge.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BINS = 1000
"""Of the coherence, from 0 to 1."""
COHERENCE = {"p10": 0.1, "median": 0.5, "p90": 0.9}


@dataclass(frozen=True)
class Commonality(Sums):
    """What the changes of some linear maps have in common; only maps that two or more models changed.

    Attributes:
        energy: sum of ||tau_t||^2 over models and maps.
        common: of this, what is in the common part: N ||mean_t(tau_t V) diag(g)||^2, g the gate of
            `ktmerge.merge.common.Shared`.
        spectrum: energy by coherence kappa of the direction it is in, ``[BINS]``.
        counts: how many models changed each map.
    """

    energy: float
    common: float
    spectrum: NDArray[np.float64]
    counts: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the energy that is common, in [0, 1]."""
        return self.common / self.energy

    def quantile(self, share: float) -> float:
        """The coherence below which this share of the energy lies, to 1 / `BINS`."""
        cumulated = self.spectrum.cumsum()
        place = int(cumulated.searchsorted(share * cumulated[-1]))
        return (min(place, BINS - 1) + 0.5) / BINS

    def to_json(self) -> dict[str, Any]:
        quantiles = {name: round(self.quantile(share), 4) for name, share in COHERENCE.items()}
        return {
            "share": float(f"{self.share:.6g}"),
            "coherence": quantiles,
            "maps": len(self.counts),
            "effective_experts": Effective.of(self.counts).to_json(),
        }


def commonalities(
    base: Checkpoint,
    names: Sequence[str],
    others: Mapping[str, Checkpoint],
    mappings: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> Iterator[tuple[str, Commonality]]:
    """What is common in each of these tensors, of class matrix, that two or more tuned models changed.

    Args:
        base: the base.
        names: its tensors.
        others: tuned models by name.
        mappings: per tuned model, base name -> its name, as `Alignment.mapping`.
        progress: where to report.

    Raises:
        KtmergeError: a file cannot be read, or was changed meanwhile.
    """
    wanted = [name for name in names if base.tensors[name].numel and sum(name in one for one in mappings.values()) > 1]
    with ExitStack() as stack:
        own = stack.enter_context(base.reader())
        readers = {name: stack.enter_context(other.reader()) for name, other in others.items()}
        total = sum(base.tensors[name].nbytes for name in wanted)
        step = stack.enter_context(progress.task("compare", total, "bytes"))
        for name in wanted:
            layout = matrix_layout(name, base.tensors[name].shape, base.config)
            theirs = [(readers[model], mapping[name]) for model, mapping in mappings.items() if name in mapping]
            found = None if layout is None else _of_tensor(own, name, theirs, base.tensors[name].shape, layout)
            step.advance(base.tensors[name].nbytes)
            if found is not None:
                yield name, found
        for reader in (own, *readers.values()):
            reader.check_unchanged()


def _of_tensor(
    base: Reader, name: str, others: Sequence[tuple[Reader, str]], shape: tuple[int, ...], layout: MatrixLayout
) -> Commonality | None:
    """All maps of one tensor together; None if no two models changed one of them."""
    import torch

    from ktmerge.merge.matrices import maps_in

    with torch.inference_mode():
        start = base.read(name).float()
        maps = maps_in(start.view(shape), layout)
        deltas = [maps_in((reader.read(there).float() - start).view(shape), layout) for reader, there in others]
        every = [_of_map(one, list(own)) for one, *own in zip(maps, *deltas, strict=True)]
    found = [one for one in every if one is not None]
    return reduce(add, found) if found else None


def _of_map(base: Tensor, deltas: list[Tensor]) -> Commonality | None:
    import numpy as np

    from ktmerge.merge.common import shared
    from ktmerge.merge.matrices import changed

    members = [deltas[t] for t in changed(deltas, base)]
    if len(members) < 2 or not all(math.isfinite(float(one.sum())) for one in members):
        return None
    found = shared(members)
    energies, coherence = found.energies.cpu().numpy(), found.coherence.cpu().numpy()
    places = np.clip((coherence * BINS).astype(np.int64), 0, BINS - 1)
    energy = float(energies.sum())
    spectrum = np.bincount(places, weights=energies, minlength=BINS).astype(np.float64)
    return Commonality(energy, found.common_share() * energy, spectrum, (len(members),))
