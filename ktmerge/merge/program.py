"""What stages may say about themselves so that the compiled kernels can run them: codes and numbers, no functions.

A stage that can say so in these words gets the fast way without any other change. Loads no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ktmerge.checkpoints.matrices import MatrixLayout
    from ktmerge.checkpoints.reader import TensorReader
    from ktmerge.merge.stage import Pipeline, Scope


@dataclass(frozen=True)
class Trim:
    """Keep the ``floor(density n)`` largest magnitudes of a tensor or of all; equal ones by the hash ``purpose``.

    ``outliers``: without the ``floor(outliers n)`` largest, which come before those; if both do not fit, fewer.
    """

    density: float
    scope: Scope
    purpose: str
    outliers: float = 0.0

    def counts(self, elements: int) -> tuple[int, int]:
        """How many of the largest are outliers or kept, and how many are outliers."""
        kept = math.floor(self.density * elements)
        outliers = min(math.floor(self.outliers * elements), elements - kept)
        return outliers + kept, outliers


@dataclass(frozen=True)
class Drop:
    """Keep elements whose random word of the stream ``purpose`` is below ``density * 2**32``, times ``factor``."""

    density: float
    factor: float
    purpose: str


@dataclass(frozen=True)
class Sum:
    """``sum_t weights_t tau_t``."""

    weights: Sequence[float]


@dataclass(frozen=True)
class Largest:
    """Of all ``weights_t tau_t`` the largest magnitude; between equals of both signs the sign of the sum of all."""

    weights: Sequence[float]


@dataclass(frozen=True)
class Elect:
    """Sign of ``sum_t votes_t tau_t``, then something of those that agree.

    Attributes:
        votes: of each expert; ``counted``: for the delta's sign, not for the delta.
        weights: of the deltas that agree.
        shares: what the sum of those is divided by, summed over those that agree.
        aggregate: the mean, by weights and shares; the sum, by weights; or the largest.
        counted: whether only signs vote.
        fallback: the sign where the vote is even; 0 for none.
    """

    votes: Sequence[float]
    weights: Sequence[float]
    shares: Sequence[float]
    aggregate: Literal["mean", "sum", "largest"] = "mean"
    counted: bool = False
    fallback: float = 0.0


@dataclass(frozen=True)
class Given:
    """Something that was merged before, by other means."""


@dataclass(frozen=True)
class Energies:
    """Squared norms over a tensor or over all: of the base, of each delta, and of the experts if they are wanted."""

    base: Fraction
    deltas: Sequence[Fraction]
    experts: Sequence[Fraction] = ()


@dataclass(frozen=True)
class Measured:
    """``sum_t w_t tau_t`` with weights that depend on the deltas as a whole.

    Attributes:
        measure: on their inner products (a `Geometry` of one group), on their norms, or on the experts' norms too.
        scope: of each tensor, or of all.
        weights: w_t, of a `Geometry` or of `Energies`.
    """

    measure: Literal["geometry", "deltas", "experts"]
    scope: Scope
    weights: Callable[[Any], Sequence[float]]


@dataclass(frozen=True)
class Ruled:
    """A rule of `ktmerge.merge.kernels.ruling`.

    Attributes:
        rule: its code.
        weights: of the deltas.
        numbers: up to four that it has.
        factors: of each expert, further ones.
        asks: what has to be known first: the sensitivity that ``share`` of all elements do not exceed; how many changes
            of each expert others share, and how many they do not, both over ``scope``; or Fisher information.
        answer: the rule, given the first, or both numbers of each expert.
        known: where the Fisher information of base and experts is, and its norms: filled in for each tensor.
        sizes: the latter.
    """

    rule: int
    weights: Sequence[float]
    numbers: Sequence[float] = ()
    factors: Sequence[float] = ()
    asks: Literal["nothing", "limit", "overlap", "information"] = "nothing"
    scope: Scope = "tensor"
    share: float = 0.0
    answer: Callable[..., Ruled] | None = None
    known: Sequence[tuple[TensorReader, str]] = ()
    sizes: Sequence[float] = ()

    @cached_property
    def told(self) -> NDArray[np.float64]:
        """All numbers as the kernel reads them."""
        import numpy as np

        count = len(self.weights)
        found = np.zeros(5 + 3 * count)
        found[: len(self.numbers)] = self.numbers
        found[4 : 4 + count] = self.weights
        found[4 + count : 4 + 2 * count] = self.factors or 1.0
        found[4 + 2 * count : 5 + 3 * count] = self.sizes or 0.0
        return found


@dataclass(frozen=True)
class Chosen:
    """All of a delta or nothing, by the tensor's name.

    Attributes:
        kept: given seed, name and where the maps are; None where only some of them stay.
    """

    kept: Callable[[int, str, MatrixLayout | None], bool | None]

    def drop(self, seed: int, name: str, layout: MatrixLayout | None) -> Drop | None:
        """The same in other words; None if there are none."""
        kept = self.kept(seed, name, layout)
        return None if kept is None else Drop(float(kept), 1.0, "chosen")


@dataclass(frozen=True)
class Budget:
    """The merged delta of a tensor as long as the experts' on average.

    Attributes:
        factor: of the squared norms of base and deltas, of that of the merged delta, and of the experts' weights.
    """

    factor: Callable[[Energies, Fraction, Sequence[float]], float]


@dataclass(frozen=True)
class Clamp:
    """No element of the merged delta beyond ``limit``."""

    limit: float


@dataclass(frozen=True)
class Cap:
    """The merged delta's norm over a tensor, at most ``rho`` times the base's."""

    rho: float

    def limit(self, base: Fraction, merged: Fraction) -> float:
        """The factor that would bring the norm there, from squared norms; infinite if nothing changed."""
        return self.rho * math.sqrt(base / merged) if merged else math.inf


@dataclass(frozen=True)
class Ramp:
    """The merged delta times ``first`` in the first layer of a stack, ``first + rise`` in the last, even steps between.

    What is in no layer is as deep as ``outside`` says, from 0 to 1; so is what is in a stack of one layer with 0.
    """

    first: float
    rise: float = 0.0
    outside: float = 0.0

    def factor(self, part: str, layers: Mapping[str, int]) -> float:
        """For a tensor of a part, e.g. ``llm.layers[3]``; ``layers`` are the numbers of layers of the stacks."""
        layer = _LAYER.fullmatch(part)
        if not layer:
            return self.first + self.rise * self.outside
        last = layers[layer[1]] - 1
        return self.first + self.rise * (int(layer[2]) / last if last > 0 else 0.0)


_LAYER = re.compile(r"(.+)\.layers\[(\d+)\]")


@dataclass(frozen=True)
class Program:
    """A pipeline in these words."""

    steps: tuple[Trim | Drop | Chosen, ...]
    combine: Sum | Largest | Elect | Given | Measured | Ruled
    after: Clamp | Cap | Ramp | Budget | None = None

    @property
    def limit(self) -> float:
        """The largest magnitude of an element of the merged delta."""
        return self.after.limit if isinstance(self.after, Clamp) else math.inf


def program_of(pipeline: Pipeline, weights: Mapping[str, float]) -> Program | None:
    """The program of a pipeline for experts, sorted by name, of these weights; None if a stage has none."""
    if len(pipeline.after) > 1:
        return None
    steps = [use.stage.compiled(use.parameters) for use in pipeline.transforms]
    combine = pipeline.combine.stage.compiled(pipeline.combine.parameters, weights)
    after = [use.stage.compiled(use.parameters) for use in pipeline.after]
    if combine is None or any(step is None for step in (*steps, *after)):
        return None
    pooled = isinstance(combine, Measured | Ruled) and combine.scope == "global"
    if pooled and any(isinstance(step, Trim) and step.scope == "tensor" for step in steps):
        return None  # thresholds of one tensor are found when its turn comes
    if isinstance(combine, Ruled) and any(isinstance(one, Cap | Budget) for one in after):
        return None
    return Program(tuple(steps), combine, *after)
