"""Log-likelihoods of token sequences under a loaded model: batched, padded, and the same at any batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ktmerge.errors import KtmergeError
from ktmerge.eval.batching import limits, out_of_memory, padded
from ktmerge.eval.encode import Request
from ktmerge.eval.finite import NotFiniteError
from ktmerge.eval.passes import Pass, batches, plan_passes
from ktmerge.eval.prefixes import COST, Group, share_prefixes
from ktmerge.eval.sight import Sight
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Likelihoods:
    """Of each request: sum of log p(token | what stands before) in nats, and how many tokens were the likeliest."""

    logprob: NDArray[np.float64]
    correct: NDArray[np.int64]


class LikelihoodScorer:
    """Scores requests with one loaded model.

    What several requests begin with is read once. Only the hidden states whose logits are needed go through the output
    head (the vocabulary is the largest matrix of a small model), and the softmax is taken in fp32.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int | None = None,
        pack: bool | None = None,
        sight: Sight | None = None,
        cost: int = COST,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: a causal transformers model in eval mode.
            batch_size: most sequences in a forward pass; by default what is useful and fits into memory.
            pack: whether choices may stand side by side behind their context, and keys and values of a common beginning
                be kept; by default where the model allows it.
            sight: prepares what has images.
            cost: tokens that a common beginning has to save before it is read by itself.
        """
        self.model = model
        self._device = model.device
        self._batch_size = batch_size
        self._head = model.get_output_embeddings()
        self._dtype = next(model.parameters()).dtype
        self._pack = pack
        self._sight = sight
        self._cost = cost

    def score(
        self, requests: Sequence[Request], progress: Progress = SILENT, label: str = "score", items: int | None = None
    ) -> Likelihoods:
        """Score ``requests``; results in their order.

        Args:
            requests: what to score.
            progress: where to report to.
            label: names the work there.
            items: how many items the requests belong to, for progress; by default each is one.

        Raises:
            NotFiniteError: the model gives NaN or infinite logits; with the number of a request.
            KtmergeError: the device's memory doesn't suffice.
        """
        groups = self._groups(requests)
        logprob = np.zeros(len(requests))
        correct = np.zeros(len(requests), dtype=np.int64)
        bounds = limits(self.model, self._batch_size)
        total = len(requests) if items is None else items
        share = total / max(1, len(requests))
        with progress.task(label, total, "items") as step, torch.inference_mode():
            for group in groups:
                kept = self._read(group.prefix) if group.prefix else None
                sequences = min(bounds.sequences, max(1, bounds.kept // max(1, len(group.prefix))))
                for batch in batches(group.passes, sequences, bounds.tokens, bounds.logits):
                    self._score_batch(batch, kept, requests, logprob, correct)
                    step.advance(share * sum(len(one.targets) for one in batch))
        return Likelihoods(logprob, correct)

    def _groups(self, requests: Sequence[Request]) -> list[Group]:
        if self._pack is not False:
            passes = plan_passes(requests, pack=True)
            groups = share_prefixes(passes, self._cost)
            if not any(one.branches for one in passes) and not any(group.prefix for group in groups):
                return groups
            if self._pack is None:
                self._pack = allows_packing(self.model)
            if self._pack:
                return groups
        return [Group((), plan_passes(requests, pack=False))]

    def _read(self, prefix: tuple[int, ...]) -> KeysAndValues:
        """Keys and values of a common beginning, of every layer [1, heads, length, size]."""
        ids = torch.tensor([prefix], device=self._device)
        last = torch.tensor([[0, len(prefix) - 1]], device=self._device)
        with _only_at(self._head, *last.unbind(1)):
            cache = self.model(input_ids=ids, use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _score_batch(
        self,
        batch: list[Pass],
        kept: KeysAndValues | None,
        requests: Sequence[Request],
        logprob: NDArray[np.float64],
        correct: NDArray[np.int64],
    ) -> None:
        """Score a batch; by default one that does not fit into memory is halved until it does."""
        try:
            self._score_fitting(batch, kept, requests, logprob, correct)
            return
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1 or self._batch_size is not None:
                advice = "it has no room for one item" if len(batch) == 1 else "choose a smaller batch size, or auto"
                raise KtmergeError(f"out of memory on {self._device}; {advice}.") from error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._score_batch(half, kept, requests, logprob, correct)

    def _score_fitting(
        self,
        batch: list[Pass],
        kept: KeysAndValues | None,
        requests: Sequence[Request],
        logprob: NDArray[np.float64],
        correct: NDArray[np.int64],
    ) -> None:
        places: dict[tuple[int, int], int] = {}  # choices of one token ask for the same place
        asked: list[int] = []
        tokens: list[int] = []
        owners: list[int] = []
        for row, one in enumerate(batch):
            for request, positions in one.targets:
                asked += [places.setdefault((row, position), len(places)) for position in positions]
                tokens += requests[request].continuation
                owners += [request] * len(positions)
        logits = self._logits(batch, kept, torch.tensor(list(places)))
        device = logits.device
        values, hits = _log_softmax_at(logits, torch.tensor(asked, device=device), torch.tensor(tokens, device=device))
        finite = torch.isfinite(values).cpu().numpy()
        if not finite.all():
            raise NotFiniteError(min(owner for owner, good in zip(owners, finite, strict=True) if not good))
        np.add.at(logprob, owners, values.cpu().numpy().astype(np.float64))
        np.add.at(correct, owners, hits.cpu().numpy().astype(np.int64))

    def _logits(self, batch: list[Pass], kept: KeysAndValues | None, places: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] at the n ``places`` [n, 2] (row, column) of the padded batch."""
        before = 0 if kept is None else kept[0][0].shape[2]
        inputs = {name: value.to(self._device) for name, value in self._inputs(batch, before).items()}
        rows, columns = places.to(self._device).unbind(1)
        cache = None if kept is None else _cache(kept, len(batch))
        with _only_at(self._head, rows, columns) as asked:
            logits: torch.Tensor = self.model(**inputs, past_key_values=cache, use_cache=cache is not None).logits
        return logits[0] if asked else logits[rows, columns]  # the head need not be the module that made them

    def _inputs(self, batch: list[Pass], before: int) -> dict[str, torch.Tensor]:
        """Token ids [rows, longest], padded on the right, with the mask that padding or packing needs.

        ``before`` tokens, the same for all rows, are there already as keys and values.
        """
        views = [one.view for one in batch if one.view is not None]
        if views and self._sight is not None:
            return self._sight.inputs(views, [one.tokens for one in batch], "right", self._dtype)
        inputs = padded([one.tokens for one in batch], "right")
        if before or any(one.branches for one in batch):
            inputs |= self._packed_inputs(batch, inputs["input_ids"].shape[1], before)
        return inputs

    def _packed_inputs(self, batch: list[Pass], longest: int, before: int) -> dict[str, torch.Tensor]:
        """Positions [rows, longest] and additive mask [rows, 1, longest, before + longest]."""
        positions = torch.arange(longest).repeat(len(batch), 1)
        seen = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(batch), 1, 1)
        for row, one in enumerate(batch):
            positions[row, len(one.tokens) :] = 0  # padding beside packed rows may be past the last position there is
            for start, stop in one.branches:
                prefix = one.branches[0][0]
                positions[row, start:stop] = torch.arange(prefix, prefix + stop - start)
                seen[row, start:stop, prefix:start] = False
        blocked = torch.finfo(self._dtype).min
        mask = torch.zeros(len(batch), longest, before + longest, dtype=self._dtype)
        mask[:, :, before:].masked_fill_(~seen, blocked)
        return {"position_ids": before + positions, "attention_mask": mask[:, None]}


_ALLOWED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def allows_packing(model: Any) -> bool:
    """Whether continuations may stand side by side in one pass, told apart by an explicit mask and positions, behind
    keys and values that were kept.

    Asked of the model itself, once: not where layers look at a window or carry a state, and only if a small probe gives
    the same logits both ways (models that ignore the positions given to them don't).
    """
    if model not in _ALLOWED:
        _ALLOWED[model] = _could_pack(model) and _packs_equally(model)
    return _ALLOWED[model]


def _could_pack(model: Any) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return False
    return getattr(config, "_attn_implementation", None) in ("sdpa", "eager")


def _packs_equally(model: Any) -> bool:
    """Two contexts that begin alike, with two continuations each: read once each, and all apart."""
    size = min(int(model.config.get_text_config().vocab_size), 64)
    ids = tuple((7 * i + 3) % size for i in range(16))
    probes = [Request((*ids[:6], ids[6 + i]), ids[8 + 2 * j : 11 + 2 * j]) for i in range(2) for j in range(2)]
    try:
        plain = LikelihoodScorer(model, pack=False).score(probes).logprob
        packed = LikelihoodScorer(model, pack=True, cost=0).score(probes).logprob
    except (KtmergeError, RuntimeError, TypeError, ValueError, AttributeError):
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    return bool(np.allclose(plain, packed, rtol=tolerance, atol=tolerance))


KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]


def _cache(kept: KeysAndValues, rows: int) -> Any:
    """A cache of ``rows`` rows that begin alike; what is kept stays as it is, a pass only adds to copies of it."""
    from transformers import DynamicCache

    return DynamicCache([(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in kept])


@contextmanager
def _only_at(head: Any, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[list[bool]]:
    """Let the output head see only the hidden states at (row, column): [rows, length, size] becomes [1, n, size].

    Done by a hook and not by calling the head, because some models scale or cap the logits after it. Yields a list that
    is empty until the head was asked.
    """
    asked: list[bool] = []
    if head is None:
        yield asked
        return

    def chosen(_: Any, args: Any) -> Any:
        asked.append(True)
        return (args[0][rows, columns][None], *args[1:])

    handle = head.register_forward_pre_hook(chosen)
    try:
        yield asked
    finally:
        handle.remove()


def _log_softmax_at(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of ``tokens`` [m] under ``logits[rows]`` [m, vocabulary], and whether each is the likeliest token.

    The logits are used up: the softmax's denominator is computed in their place, to save a copy of the largest tensor.
    """
    logits = logits.float()
    top, likeliest = logits.max(dim=-1)
    chosen = logits[rows, tokens]
    denominator = top + logits.sub_(top[:, None]).exp_().sum(dim=-1).log()
    return chosen - denominator[rows], likeliest[rows] == tokens
