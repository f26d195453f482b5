"""Measured inputs of the linear maps in a tensor, as covariances; for stages that ask for them with `Need`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktmerge.errors import KtmergeError
from ktmerge.merge.covariance import Covariance, of_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.stage import Context, Measurements


def measurements(context: Context) -> Measurements:
    """What was measured of the tensor.

    Raises:
        KtmergeError: nothing was.
    """
    if context.measured is None:
        raise KtmergeError(
            f"tensor '{context.tensor}': the method needs measurements on data and has none; make them with "
            "'ktmerge stats'."
        )
    return context.measured


class Sampled:
    """The inputs of one tensor's maps, each model's read once.

    Args:
        context: of the stage.
        fused: whether maps that share a tensor are counted one by one; their inputs are the same.
    """

    def __init__(self, context: Context, *, fused: bool = False) -> None:
        self._tensor = context.tensor
        self._measured = measurements(context)
        self._each = len(context.layout.outputs) if fused and context.layout is not None else 1
        self._found: dict[str, Tensor] = {}

    def inputs(self, expert: str, number: int) -> Tensor:
        """Sampled inputs ``[R, i]`` of the map of that number; of the base on upstream data if ``expert`` is empty."""
        if expert not in self._found:
            self._found[expert] = self._measured.inputs(expert)
        found = self._found[expert]
        return found[number // self._each] if found.dim() == 3 else found

    def covariance(self, expert: str, number: int, inputs: int, eta: float = 1.0) -> Covariance:
        """X^T X / R of a map with so many inputs, everything off the diagonal times ``eta``.

        Raises:
            KtmergeError: the samples have another width.
        """
        sample = self.inputs(expert, number)
        if sample.shape[-1] != inputs:
            owner = f"expert '{expert}'" if expert else "the base"
            raise KtmergeError(
                f"tensor '{self._tensor}' has {inputs} inputs, but {sample.shape[-1]} were measured in {owner}; "
                "measure it again with 'ktmerge stats'."
            )
        return of_inputs(sample, eta)
