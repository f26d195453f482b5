"""Where base + (expert - base) is inexact: the difference or the sum was rounded, or the expert is -0.

A merged delta that is an expert's is to make that expert's value bit for bit. Elsewhere than at these places, which are
few where fine-tunes changed little, adding it to the base does so, and the experts need not be read beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.pristine import HostReader

_CHUNK = 1 << 22
"""Elements looked at together."""
_FEW = 16
"""Inexact places are at most one element in so many."""


@dataclass(frozen=True)
class Inexact:
    """The inexact places of one tensor.

    Attributes:
        places: indices of elements, ascending, int64.
        values: fp32 patterns of all experts' values there, uint32 ``[places, N]``.
    """

    places: NDArray[np.int64]
    values: NDArray[np.uint32]


def inexact_places(
    base: HostReader, name: str, experts: Sequence[tuple[HostReader, str]], elements: int
) -> Inexact | None:
    """Those of a tensor, of any of the experts; None if they are many, or an input is not finite.

    Args:
        base: a reader of the base.
        name: of the tensor there.
        experts: readers of the experts, and its names there.
        elements: of the tensor.
    """
    import torch

    places: list[NDArray[np.int64]] = []
    values: list[NDArray[np.uint32]] = []
    found = 0
    for start in range(0, elements, _CHUNK):
        stop = min(start + _CHUNK, elements)
        own = base.read(name, start, stop).float()
        theirs = torch.stack([reader.read(source, start, stop).float() for reader, source in experts])
        deltas = theirs - own
        made = own + deltas
        if not bool((made.isfinite() & theirs.isfinite()).all()):
            return None
        missed = ((made.view(torch.int32) != theirs.view(torch.int32)) & (deltas != 0)).any(0).nonzero()[:, 0]
        found += len(missed)
        if _FEW * found > elements:
            return None
        places.append(missed.numpy() + start)
        values.append(theirs[:, missed].T.contiguous().numpy().view(np.uint32))
    return Inexact(np.concatenate(places), np.concatenate(values))
