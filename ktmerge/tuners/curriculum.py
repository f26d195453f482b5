"""The order of samples: from easy to hard, or from what the tasks have in common to what sets them apart.

Either order has every sample once in an epoch, as shuffling has, so that runs of equal steps are comparable. The base
says what is easy (its loss) and what is common (its hidden states); it is asked once, before the first step.

Imports torch; import it only where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ktmerge.progress import Progress
from ktmerge.tuners.collate import IGNORED
from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.loss import following, for_model
from ktmerge.tuners.mode import evaluating
from ktmerge.tuners.partial import read_object, write_object

_ENERGY = 0.9
"""Share of a task's variation that its own subspace holds."""
_SHARED = 0.5
"""A direction is common if the tasks' subspaces hold it to more than this on average."""
_DECIMALS = 6
"""Scores that differ by less are equal, so that the last bits of a sum do not decide."""


@dataclass(frozen=True)
class Ordered:
    """The same order in every epoch.

    Attributes:
        order: places of all samples.
    """

    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is alike."""


def ordered(scores: Callable[[], Tensor], path: Path) -> Ordered:
    """The order of ``scores``, the lowest first; of the file, if an earlier part of the run left it there.

    Args:
        scores: fp64 ``[samples]``; asked for only if there is no file.
        path: of the file.
    """
    if path.exists():
        return Ordered(read_object(path)["order"])
    found = [round(score, _DECIMALS) for score in scores().tolist()]
    order = sorted(range(len(found)), key=lambda place: (found[place], place))
    write_object(path, {"order": order, "scores": found})
    return Ordered(order)


def difficulties(
    model: Any, samples: Sequence[Encoded], collate: Callable[..., Mapping[str, Tensor]], size: int, progress: Progress
) -> Tensor:
    """The model's mean loss per trained token of each sample, fp64 ``[samples]``."""

    def of(inputs: Mapping[str, Tensor]) -> Tensor:
        targets = following(inputs["labels"])
        wanted = targets != IGNORED
        logits = model(**for_model(inputs), use_cache=False).logits[wanted].float()
        losses = functional.cross_entropy(logits, targets[wanted], reduction="none").double()
        rows = wanted.nonzero()[:, 0]
        total = torch.zeros(len(wanted), dtype=torch.float64, device=losses.device).index_add(0, rows, losses)
        return total / wanted.sum(1).clamp(min=1)

    return _of_each(of, model, samples, collate, size, progress, "asking the base what is hard")


def strangeness(
    model: Any,
    samples: Sequence[Encoded],
    tasks: Sequence[int],
    collate: Callable[..., Mapping[str, Tensor]],
    size: int,
    progress: Progress,
) -> Tensor:
    """How far each sample lies from what the tasks have in common, fp64 ``[samples]`` in 0..1; see `apart`.

    Args:
        model: the base.
        samples: of all tasks.
        tasks: number of the task of each.
        collate: makes batches.
        size: samples of a batch.
        progress: told of samples.
    """

    def of(inputs: Mapping[str, Tensor]) -> Tensor:
        hidden = model(**for_model(inputs), use_cache=False, output_hidden_states=True).hidden_states[-1].double()
        mask = inputs["attention_mask"].to(hidden).unsqueeze(2)
        mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return mean

    features = _of_each(of, model, samples, collate, size, progress, "asking the base what is common")
    return apart(features, torch.tensor(tasks))


def apart(features: Tensor, tasks: Tensor) -> Tensor:
    """The share of each sample's variation outside of the subspace that the tasks have in common.

    Of every task the leading directions of its features around their mean, which hold nine tenths of the variation,
    span its subspace. The mean of the projections on these has eigenvalues that say to what share the tasks hold a
    direction; those above a half span the common one (if there is none, the single most common direction).

    Args:
        features: fp64 ``[samples, width]``.
        tasks: int64 ``[samples]``.
    """
    centred = torch.empty_like(features)
    together = features.new_zeros(features.shape[1], features.shape[1])
    kinds = sorted(set(tasks.tolist()))
    for kind in kinds:
        own = features[tasks == kind]
        centred[tasks == kind] = own = own - own.mean(0)
        _, sizes, directions = torch.linalg.svd(own, full_matrices=False)
        held = sizes.square().cumsum(0) / sizes.square().sum().clamp(min=torch.finfo(sizes.dtype).tiny)
        leading = directions[: int((held < _ENERGY).sum()) + 1]
        together += leading.T @ leading / len(kinds)
    shares, directions = torch.linalg.eigh(together)
    common = directions[:, shares > _SHARED] if bool((shares > _SHARED).any()) else directions[:, -1:]
    inside = (centred @ common).square().sum(1)
    whole = centred.square().sum(1)
    return torch.where(whole > 0, 1 - inside / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)


def tasks_of(sizes: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Which data file each sample is of.

    Args:
        sizes: samples of each file.
        kept: places of those that were not too long.
    """
    ends = torch.tensor(sizes).cumsum(0)
    found: list[int] = torch.searchsorted(ends, torch.tensor(kept), right=True).tolist()
    return found


def _of_each(
    measure: Callable[[Mapping[str, Tensor]], Tensor],
    model: Any,
    samples: Sequence[Encoded],
    collate: Callable[..., Mapping[str, Tensor]],
    size: int,
    progress: Progress,
    what: str,
) -> Tensor:
    """What is measured of every sample, in batches of like length, in the order of the samples."""
    order = sorted(range(len(samples)), key=lambda place: len(samples[place]))
    found: list[Tensor] = []
    with evaluating(model), torch.no_grad(), progress.task(what, len(samples), "items") as step:
        for first in range(0, len(order), size):
            batch = [samples[place] for place in order[first : first + size]]
            inputs = {name: value.to(model.device) for name, value in collate(batch).items()}
            found.append(measure(inputs).cpu())
            step.advance(len(batch))
    joined = torch.cat(found)
    return torch.empty_like(joined).index_copy_(0, torch.tensor(order), joined)
