"""Log-likelihoods of token sequences under a loaded model: batched, padded, and the same at any batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktmerge.errors import KtmergeError
from ktmerge.eval.encode import Request
from ktmerge.eval.passes import Pass, batches, plan_passes
from ktmerge.eval.sight import Sight
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKENS = {"cpu": 1024, "cuda": 16384}  # of a batch, with padding; more does not pay on a processor
LOGITS = 2**26  # entries of the logits of a batch: 256 MiB in fp32


@dataclass(frozen=True)
class Likelihoods:
    """Of each request: sum of log p(token | what stands before) in nats, and how many tokens were the likeliest."""

    logprob: NDArray[np.float64]
    correct: NDArray[np.int64]


class LikelihoodScorer:
    """Scores requests with one loaded model.

    Only the hidden states whose logits are needed go through the output head (the vocabulary is the largest matrix of a
    small model), and the softmax is taken in fp32.
    """

    def __init__(self, model: Any, batch_size: int = 16, pack: bool | None = None, sight: Sight | None = None) -> None:
        """Wrap ``model``.

        Args:
            model: a causal transformers model in eval mode.
            batch_size: most sequences in a forward pass.
            pack: whether choices may stand side by side behind their context; by default where the model allows it.
            sight: prepares what has images.
        """
        self.model = model
        self._device = model.device
        self._batch_size = batch_size
        self._head = model.get_output_embeddings()
        self._dtype = next(model.parameters()).dtype
        self._pack = pack
        self._sight = sight

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
            KtmergeError: the model gives NaN or infinite logits, or the device's memory doesn't suffice.
        """
        passes = self._passes(requests)
        logprob = np.zeros(len(requests))
        correct = np.zeros(len(requests), dtype=np.int64)
        most = max(1, LOGITS // self._vocabulary())
        total = len(requests) if items is None else items
        share = total / max(1, len(requests))
        with progress.task(label, total, "items") as step, torch.inference_mode():
            for batch in batches(passes, self._batch_size, TOKENS.get(self._device.type, 1024), most):
                self._score_batch(batch, requests, logprob, correct)
                step.advance(share * sum(len(one.targets) for one in batch))
        if not np.isfinite(logprob).all():
            raise KtmergeError("the model's logits are not finite numbers; its weights are broken.")
        return Likelihoods(logprob, correct)

    def _passes(self, requests: Sequence[Request]) -> list[Pass]:
        if self._pack is not False:
            passes = plan_passes(requests, pack=True)
            if not any(one.branches for one in passes):
                return passes
            if self._pack is None:
                self._pack = allows_packing(self.model)
            if self._pack:
                return passes
        return plan_passes(requests, pack=False)

    def _score_batch(
        self,
        batch: list[Pass],
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
        logits = self._logits(batch, torch.tensor(list(places)))
        device = logits.device
        values, hits = _log_softmax_at(logits, torch.tensor(asked, device=device), torch.tensor(tokens, device=device))
        np.add.at(logprob, owners, values.cpu().numpy().astype(np.float64))
        np.add.at(correct, owners, hits.cpu().numpy().astype(np.int64))

    def _logits(self, batch: list[Pass], places: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] at the n ``places`` [n, 2] (row, column) of the padded batch."""
        inputs = {name: value.to(self._device) for name, value in self._inputs(batch).items()}
        rows, columns = places.to(self._device).unbind(1)
        try:
            with _only_at(self._head, rows, columns):
                logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        except torch.OutOfMemoryError as error:
            raise KtmergeError(f"out of memory on {self._device}; choose a smaller batch size.") from error
        if logits.shape[:2] == inputs["input_ids"].shape:  # the head was not the module that made them
            return logits[rows, columns]
        return logits[0]

    def _inputs(self, batch: list[Pass]) -> dict[str, torch.Tensor]:
        """Token ids [rows, longest], padded on the right, with the mask that padding or packing needs."""
        views = [one.view for one in batch if one.view is not None]
        if views and self._sight is not None:
            return self._sight.inputs(views, [one.tokens for one in batch], "right", self._dtype)
        longest = max(len(one.tokens) for one in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, one in enumerate(batch):
            ids[row, : len(one.tokens)] = torch.tensor(one.tokens)
        if any(one.branches for one in batch):
            return {"input_ids": ids} | self._packed_inputs(batch, longest)
        lengths = torch.tensor([len(one.tokens) for one in batch])
        return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    def _packed_inputs(self, batch: list[Pass], longest: int) -> dict[str, torch.Tensor]:
        """Positions [rows, longest] and additive mask [rows, 1, longest, longest]."""
        positions = torch.arange(longest).repeat(len(batch), 1)
        seen = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(batch), 1, 1)
        for row, one in enumerate(batch):
            for start, stop in one.branches:
                prefix = one.branches[0][0]
                positions[row, start:stop] = torch.arange(prefix, prefix + stop - start)
                seen[row, start:stop, prefix:start] = False
        blocked = torch.finfo(self._dtype).min
        mask = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, blocked)
        return {"position_ids": positions, "attention_mask": mask[:, None]}

    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def allows_packing(model: Any) -> bool:
    """Whether continuations may stand side by side in one pass, told apart by an explicit mask and positions.

    Asked of the model itself: not where layers look at a window or carry a state, and only if a small probe gives the
    same logits both ways (models that ignore the positions given to them don't).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    size = min(int(config.vocab_size), 64)
    ids = [(7 * i + 3) % size for i in range(24)]
    context = tuple(ids[:16])
    probes = [Request(context, tuple(ids[16:20])), Request(context, tuple(ids[20:24]))]
    try:
        plain = LikelihoodScorer(model, pack=False).score(probes).logprob
        packed = LikelihoodScorer(model, pack=True).score(probes).logprob
    except (KtmergeError, RuntimeError, TypeError, ValueError):
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    return bool(np.allclose(plain, packed, rtol=tolerance, atol=tolerance))


@contextmanager
def _only_at(head: Any, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Let the output head see only the hidden states at (row, column): [rows, length, size] becomes [1, n, size].

    Done by a hook and not by calling the head, because some models scale or cap the logits after it.
    """
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][rows, columns][None], *args[1:]))
    try:
        yield
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
