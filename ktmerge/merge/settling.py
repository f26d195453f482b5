"""What becomes of a merged delta that is there already: scaled, settled, rounded and measured in one compiled pass.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ktmerge.merge.kernels.codes import BLOCK, GIVEN
from ktmerge.merge.workspace import WIDTHS, Blended, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.merge.kernels.native import Native


def settle_given(
    native: Native,
    kinds: Sequence[int],
    addresses: Sequence[int],
    merged: int,
    count: int,
    start: int,
    target: Target,
    room: NDArray[np.uint8] | None = None,
) -> Blended:
    """Blend ``count`` elements, the first of which is ``start`` in its tensor, given their merged delta before lambda.

    Args:
        native: the compiled kernels.
        kinds: codes of the types of base and experts.
        addresses: of the base's elements and of each expert's, as they are in their files.
        merged: address of the merged delta, fp32.
        count: how many elements.
        start: a multiple of 4 for stochastic rounding.
        target: how they are stored.
        room: where to put what is made; if not given, in memory of its own.
    """
    experts = len(kinds) - 1
    places = [address // WIDTHS[kind] for address, kind in zip(addresses, kinds, strict=True)]
    codes, firsts = np.array(kinds, np.int64), np.array([*places, merged // 4], np.int64)
    out = np.empty(count * WIDTHS[target.kind], np.uint8) if room is None else room
    ends = np.array([0.0, target.factor, target.limit, target.lambda_], np.float32)
    sums, kept, rates = np.zeros(4), np.zeros(experts, np.int64), np.zeros((3, experts), np.float32)
    scratch = np.empty((2 * experts + 7) * BLOCK, np.uint32)
    no_steps = (0, *(kept.ctypes.data,) * 8)
    status = native.direct(
        0, 0, codes.ctypes.data, firsts.ctypes.data, experts, count, start, *no_steps, GIVEN, 0, rates.ctypes.data,
        ends.ctypes.data, target.kind, int(target.stochastic), target.key, target.kind,
        out.ctypes.data // WIDTHS[target.kind], 0, sums.ctypes.data, kept.ctypes.data, scratch.ctypes.data,
    )  # fmt: skip
    return Blended(status, out.data, sums, kept)
