"""What several deltas of one map have in common: a shared frame of inputs, and how alike they answer in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.merge.covariance import Covariance, Frame, of_delta, total

if TYPE_CHECKING:
    from torch import Tensor


_EQUAL = 1e-5
"""Neighbouring eigenvalues that differ by less than this share are as good as equal: the deltas are float32."""


@dataclass(frozen=True)
class Shared:
    """N deltas in the eigenvectors v_r of sum_t tau_t^T tau_t / ||tau_t||^2.

    Attributes:
        frame: the eigenvectors, and their eigenvalues.
        responses: a_t = tau_t V ``[o, r]`` of each delta.
        energies: sum_t ||a_{t,r}||^2, ``[r]``.
        coherence: kappa_r = ||sum_t a_{t,r}||^2 / (N energies_r), ``[r]``: 1 where all answer alike, 1/N where one
            does alone or all do at right angles, 0 where they cancel.
    """

    frame: Frame
    responses: tuple[Tensor, ...]
    energies: Tensor
    coherence: Tensor

    def gate(self) -> Tensor:
        """Coherence beyond what unrelated deltas have, in [0, 1]: (kappa - 1/N) / (1 - 1/N), and 1 of one delta."""
        import torch

        count = len(self.responses)
        if count == 1:
            return torch.ones_like(self.coherence)
        return ((self.coherence - 1 / count) / (1 - 1 / count)).clamp(0, 1)

    def mean(self) -> Tensor:
        """Mean response, ``[o, r]``."""
        return sum(self.responses[1:], self.responses[0]) / len(self.responses)

    def common_share(self) -> float:
        """Share of all deltas' energy that is in their common part: N ||mean * gate||^2 / sum_t ||tau_t||^2."""
        whole = float(self.energies.sum())
        return float((self.gate() ** 2 * self.coherence * self.energies).sum()) / whole if whole else 0.0


def shared(deltas: Sequence[Tensor]) -> Shared:
    """Deltas ``[o, i]``, none of them zero, in their shared frame; float64."""
    told = [of_delta(delta) for delta in deltas]
    frame = total(told, [1.0] * len(told)).frame()
    frame, responses = _settled(frame, _responses(frame, told))
    energies = sum((one**2).sum(0) for one in responses[1:]) + (responses[0] ** 2).sum(0)
    added = sum(responses[1:], responses[0])
    return Shared(frame, responses, energies, (added**2).sum(0) / (len(told) * energies))


def _responses(frame: Frame, told: Sequence[Covariance]) -> list[Tensor]:
    """tau_t V of each; of a frame of their own rows it is there already."""
    if frame.rows is None:
        return [frame.onto(one.factor) / (one.scale or 1.0) for one in told]
    outputs = told[0].factor.shape[0]
    return [
        frame.of_rows(slice(number * outputs, (number + 1) * outputs)) / (one.scale or 1.0)
        for number, one in enumerate(told)
    ]


def _settled(frame: Frame, responses: list[Tensor]) -> tuple[Frame, tuple[Tensor, ...]]:
    """The same frame, with the eigenvectors of equal eigenvalues chosen by whose they are.

    Deltas that answer different inputs alike have equal eigenvalues; any mixture of their eigenvectors is one, too, and
    has another coherence. Wanted are those of sum_t t tau_t^T tau_t / ||tau_t||^2 among them, which tells owners apart.
    """
    import torch

    values = frame.eigenvalues
    edges = ((values[1:] < values[:-1] * (1 - _EQUAL)).nonzero().squeeze(1) + 1).tolist()
    runs = [slice(*run) for run in zip([0, *edges], [*edges, values.numel()], strict=True) if run[1] - run[0] > 1]
    if not runs or len(responses) == 1:
        return frame, tuple(responses)
    turn, turned = frame.turn.clone(), [one.clone() for one in responses]
    for run in runs:
        told = [(t + 1) * one[:, run].T @ one[:, run] / (one**2).sum() for t, one in enumerate(responses)]
        basis = torch.linalg.eigh(sum(told[1:], told[0]))[1]
        for one in (turn, *turned):
            one[:, run] = one[:, run] @ basis
    return Frame(values, frame.rows, turn), tuple(turned)
