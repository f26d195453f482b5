"""A loaded model as lm_eval wants it. Imports lm_eval; only what scores its tasks imports this."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from ktmerge.errors import KtmergeError
from ktmerge.eval.encode import Request
from ktmerge.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.likelihood import LikelihoodScorer


class LoadedModel(HFLM):  # type: ignore[misc]
    """lm_eval's Hugging Face model around one that is loaded; log-likelihoods are computed by ktmerge's scorer."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        likelihood: LikelihoodScorer,
        batch_size: int,
        progress: Progress,
        label: str,
    ) -> None:
        """Wrap ``model``; the tokenizer is copied, since lm_eval gives it a pad token."""
        super().__init__(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size, backend="causal")
        self._likelihood = likelihood
        self._progress = progress
        self._label = label

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of log p of each continuation and whether every token of it was the likeliest, as lm_eval cuts them."""
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        found = self._likelihood.score(asked, self._progress, self._label)
        return [
            (float(logprob), int(correct) == len(one.continuation))
            for one, logprob, correct in zip(asked, found.logprob, found.correct, strict=True)
        ]

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """Too long is cut from the left; of the last token nothing is read, it is only predicted."""
        whole = (context + continuation)[-(self.max_length + 1) :]
        given = len(whole) - len(continuation)
        if given < 1:
            raise KtmergeError(f"a choice is {len(continuation)} tokens long, the model reads {self.max_length}.")
        return Request(tuple(whole[:given]), tuple(whole[given:]))
