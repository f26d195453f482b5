"""What stages may say about themselves so that the compiled kernels can run them: codes and numbers, no functions.

A stage that can say so in these words gets the fast way without any other change. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktmerge.merge.stage import Pipeline, Scope


@dataclass(frozen=True)
class Trim:
    """Keep the ``floor(density n)`` largest magnitudes of a tensor or of all; equal ones by the hash ``purpose``."""

    density: float
    scope: Scope
    purpose: str


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
class Elect:
    """Sign of ``sum_t votes_t tau_t``, then the mean of those that agree, by ``weights``."""

    votes: Sequence[float]
    weights: Sequence[float]


@dataclass(frozen=True)
class Program:
    """A pipeline in these words."""

    steps: tuple[Trim | Drop, ...]
    combine: Sum | Elect


def program_of(pipeline: Pipeline, weights: Sequence[float]) -> Program | None:
    """The program of a pipeline for experts of these weights; None if a stage has none."""
    if pipeline.after:
        return None
    steps = [use.stage.compiled(use.parameters) for use in pipeline.transforms]
    combine = pipeline.combine.stage.compiled(pipeline.combine.parameters, weights)
    if combine is None or any(step is None for step in steps):
        return None
    return Program(tuple(steps), combine)
