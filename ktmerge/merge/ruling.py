"""Blends by a rule of `ktmerge.merge.kernels.ruling`: the merged delta of some elements, then what becomes of it.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ktmerge.merge.kernels.codes import FINE, INPUT_NOT_FINITE
from ktmerge.merge.settling import settle_given
from ktmerge.merge.workspace import WIDTHS, Blended, Target

if TYPE_CHECKING:
    from ktmerge.checkpoints.reader import TensorReader
    from ktmerge.merge.program import Ruled
    from ktmerge.merge.steps import Steps
    from ktmerge.merge.workspace import Workspace


def informed(rule: Ruled, stored: Sequence[tuple[TensorReader, str, float]] | None) -> Ruled | None:
    """The rule with what was measured of a tensor; None if nothing was, or in a way that is not covered here."""
    if stored is None:
        return None
    return replace(rule, known=[(reader, name) for reader, name, _ in stored], sizes=[size for *_, size in stored])


def blend_ruled(space: Workspace, steps: Steps, rule: Ruled, target: Target) -> Blended:
    """Blend what is held."""
    out, sums = np.empty(space.count * WIDTHS[target.kind], np.uint8), np.zeros(4)
    kept = np.zeros(len(rule.weights), np.int64)
    begin, status = 0, FINE
    for part in space.parts(steps, kept):
        size = part.shape[1]
        own = out[begin * WIDTHS[target.kind] :][: size * WIDTHS[target.kind]]
        merged = space.ruled(rule, part, begin)
        done = settle_given(
            space.native, space.kinds, space.addresses(begin), merged.ctypes.data, size, space.start + begin, target,
            own,
        )  # fmt: skip
        status = max(status, done.status)
        sums += done.sums
        begin += size
    return Blended(status if space.is_finite else INPUT_NOT_FINITE, out.data, sums, kept)
