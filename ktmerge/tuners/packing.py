"""Batches without padding: samples end to end in as few rows as hold them, none of them seeing another.

A model keeps samples apart by their positions, which start at 0 with each, if it is given no attention mask. Not every
model does, so it is tried on a small batch first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ktmerge.tuners.collate import IGNORED, Collator
from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.keys import keyed
from ktmerge.tuners.loss import answer_loss, tried

if TYPE_CHECKING:
    import torch

POSITIONS = "position_ids"
_TOLERANCE = 1e-5
"""Of losses: near what fp32 rounds, so that even a model whose attention matters little is found out."""


def fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sort into rows of at most ``capacity``, longest first, each into the first row that has room for it.

    Returns:
        places in ``lengths``, row by row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        row = next((row for row, left in enumerate(room) if left >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(capacity, lengths[place]))
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows


class PackingCollator:
    """Makes ``input_ids``, ``attention_mask``, ``labels`` and ``position_ids``, each ``[rows, tokens]`` int64.

    The mask says where there is a token, and is not for the model: with any mask, it would let samples see each other.

    Args:
        pad: the token to fill up with.
        row_tokens: of a row at least, if there are samples enough; the longest sample of a batch otherwise.
    """

    def __init__(self, pad: int, row_tokens: int = 0) -> None:
        self._pad = pad
        self._row_tokens = row_tokens

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        import torch

        rows = fill([len(sample) for sample in samples], max(self._row_tokens, *map(len, samples), 0))
        shape = (len(rows), max(sum(len(samples[place]) for place in row) for row in rows))
        ids, labels = torch.full(shape, self._pad), torch.full(shape, IGNORED)
        mask, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            start = 0
            for place in row:
                sample = samples[place]
                inside = slice(start, start + len(sample))
                own = torch.tensor(sample.ids, dtype=torch.int64)
                trained = torch.tensor(list(sample.trained), dtype=torch.bool)
                trained[0] = False  # the token before it is another sample's
                ids[number, inside] = own
                mask[number, inside] = 1
                positions[number, inside] = torch.arange(len(sample))
                labels[number, inside] = torch.where(trained, own, IGNORED)
                start += len(sample)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, POSITIONS: positions}


def packs_faithfully(model: Any, vocabulary: int) -> bool:
    """Whether samples in one row have the losses they have in rows of their own, and so do not see each other."""
    from array import array

    import torch

    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (9, 17, 5):
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        samples.append(Encoded(array("i", ids), bytes([1] * length)))
    padded, packed = Collator(0)(samples), PackingCollator(0, row_tokens=40)(samples)
    return tried(model, padded, packed, lambda batch: answer_loss(model, batch), _TOLERANCE)


class LengthSampler:
    """Orders samples so that every batch has samples of like length: sorted within pools of many batches.

    The batches come in random order, and every epoch has its own; one that is not full comes last.

    Args:
        lengths: tokens of each sample.
        batch: samples of a batch.
        seed: of the order.
        pool: batches that are sorted together.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, pool: int = 50) -> None:
        self._lengths, self._batch, self._seed, self._pool = lengths, batch, seed, pool
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        import torch

        generator = torch.Generator().manual_seed(keyed(self._seed, "lengths", str(self._epoch)))
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        full = len(order) // self._batch * self._batch
        batches: list[list[int]] = []
        for first in range(0, full, self._pool * self._batch):
            near = sorted(order[first : min(full, first + self._pool * self._batch)], key=self._lengths.__getitem__)
            batches += [near[start : start + self._batch] for start in range(0, len(near), self._batch)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from order[full:]
