"""The training loss: mean negative log-likelihood of the trained tokens, with the vocabulary projected only there.

Where most of a sample is prompt, most of the projection to the vocabulary is computed for positions that no label asks
for. transformers models take the wanted positions as ``logits_to_keep``; whether one does so faithfully is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktmerge.tuners.collate import IGNORED, TAUGHT
from ktmerge.tuners.mode import evaluating

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-4
PASS_TOKENS = 32
"""What a pass costs beside its tokens, in tokens: reading all weights and adding to all gradients; estimated."""
PIECE_TOKENS = 512
"""Tokens a CPU works on at a time: activations of a few hundred stay in its caches, those of thousands don't."""


def answer_loss(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the trained tokens of -log p(token | tokens before it), in fp32; see `answers`."""
    from torch.nn import functional

    logits, targets, _ = answers(model, inputs)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def answers(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model says where a token is trained.

    Args:
        model: a causal language model whose forward takes ``logits_to_keep`` as a mask.
        inputs: ``input_ids``, ``labels``, and ``attention_mask`` or, of packed samples, ``position_ids``, each
            ``[samples, tokens]``.

    Returns:
        logits ``[wanted, vocabulary]``, the tokens that come there ``[wanted]``, and where: bool ``[samples, tokens]``.
    """
    targets = following(inputs["labels"])
    wanted = targets != IGNORED
    outputs = model(**for_model(inputs), logits_to_keep=wanted, use_cache=False)
    return outputs.logits, targets[wanted], wanted


def for_model(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch the model is given: tokens, where they are, and images."""
    # packed samples are kept apart by their positions, and with a mask would see each other
    kept_back = {"labels", TAUGHT, "attention_mask" if "position_ids" in inputs else "labels"}
    return {name: value for name, value in inputs.items() if name not in kept_back}


def following(labels: torch.Tensor) -> torch.Tensor:
    """The label of the next token at each position; none at the last."""
    from torch.nn import functional

    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def count_trained(inputs: Mapping[str, torch.Tensor]) -> int:
    """How many tokens enter `answer_loss`."""
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def projects_faithfully(model: Any, vocabulary: int) -> bool:
    """Whether `answer_loss` gives what the model's own loss gives: tried on one small batch with padding in it.

    False for models that ignore or do not know the mask, and for those whose loss has further terms.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    labels = torch.where((torch.arange(24) % 3 != 0) & (mask == 1), ids, IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return tried(model, batch, batch, lambda inputs: model(**inputs).loss * count_trained(inputs))


def tried(
    model: Any,
    plain: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    expected: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    tolerance: float = _TOLERANCE,
) -> bool:
    """Whether `answer_loss` of the batch ``other`` is what ``expected`` gives of ``plain``; the model stays as it was.

    False where the model cannot take them at all.
    """
    import torch

    try:
        with evaluating(model), torch.no_grad():
            own = float(expected({name: value.to(model.device) for name, value in plain.items()}))
            found = float(answer_loss(model, {name: value.to(model.device) for name, value in other.items()}))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    items = count_trained(plain)
    return abs(own - found) <= tolerance * max(float(items), abs(own))


def pieces(inputs: Mapping[str, torch.Tensor], tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Split a batch into groups of samples of like length, each of at most ``tokens`` tokens with its padding.

    The losses of the groups add up to that of the batch. A sample longer than ``tokens`` goes alone.
    """
    lengths = inputs["attention_mask"].sum(1)
    order = lengths.argsort(stable=True).tolist()
    sizes = lengths[order].tolist()
    for first, end in cuts(sizes, tokens):
        yield _cut(inputs, order[first:end], sizes[end - 1])


def cuts(lengths: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """Where to cut a sorted list of lengths so that padding and passes cost least: first and end of each piece.

    A piece costs its samples times its longest, and `PASS_TOKENS`.
    """
    cost, start = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        best, place = math.inf, end - 1
        for first in range(end - 1, -1, -1):
            size = (end - first) * longest
            if size > tokens and end - first > 1:
                break
            if cost[first] + size + PASS_TOKENS < best:
                best, place = cost[first] + size + PASS_TOKENS, first
        cost.append(best)
        start.append(place)
    found = []
    end = len(lengths)
    while end:
        found.append((start[end], end))
        end = start[end]
    return found[::-1]


def _cut(inputs: Mapping[str, torch.Tensor], rows: list[int], length: int) -> dict[str, torch.Tensor]:
    return {name: value[rows, :length] if value.dim() > 1 else value[rows] for name, value in inputs.items()}
