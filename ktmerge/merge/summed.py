"""What stages find out by exact sums over all pieces of a tensor, or of all tensors. Importing it loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ktmerge.merge.stage import Context, OnePass, Tensor

if TYPE_CHECKING:
    from ktmerge.merge.kernels.sums import ExactSum


class Summed(OnePass):
    """Observer of exact sums of magnitudes, or of squares.

    Args:
        power: 1 or 2.
        parts: from what the stage is given, and the context, to the tensors that are summed, as many of each piece.
        result: from the experts' weights and the sums to what the stage finds.
        nothing: what it finds of no elements at all.
    """

    def __init__(
        self,
        power: int,
        parts: Callable[[Any, Context], Sequence[Tensor]],
        result: Callable[..., Any],
        nothing: Any,
    ) -> None:
        self._power, self._parts, self._result, self._nothing = power, parts, result, nothing
        self._sums: list[ExactSum] = []
        self._weights: Sequence[float] = ()

    def observe(self, values: Any, context: Context) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        found, self._weights = self._parts(values, context), context.weights
        self._sums = self._sums or [ExactSum(self._power) for _ in found]
        for total, one in zip(self._sums, found, strict=True):
            total.add(one)

    def result(self) -> Any:
        return self._result(self._weights, *(one.value() for one in self._sums)) if self._sums else self._nothing
