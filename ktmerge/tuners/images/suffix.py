"""Models that read one question, both ways, and write one answer after it: PaliGemma and its kin.

Their processors take the answer as ``suffix``, and lay the question out themselves; there is no chat template. Tokens
up to the answer see each other in both directions, so the batch says where it begins (``token_type_ids``).
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Sequence
from typing import Any

from ktmerge.tuners.data import PlainSample, Sample
from ktmerge.tuners.encode import Encoded, Extras, SampleError
from ktmerge.tuners.images.encode import NOMINAL, SeeingEncoder
from ktmerge.tuners.images.pixels import Pixels


def takes_suffix(processor: Any) -> bool:
    """Whether a processor is of such a model: it is called with a suffix, of its own or, as before, among the rest."""
    rest = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {})
    of_texts = getattr(rest.get("text_kwargs"), "__annotations__", {})
    return "suffix" in {**inspect.signature(type(processor).__call__).parameters, **of_texts}


class SuffixEncoder(SeeingEncoder):
    """Tokenises questions and answers as a processor with ``suffix`` does; see `SeeingEncoder`."""

    def _template(self) -> str | None:
        return None

    def require_template(self, samples: Sequence[Sample]) -> None:
        """Conversations need none: one question and one answer are laid out by the processor."""

    @property
    def extras(self) -> Extras | None:
        return Pixels(self.processor, prefixed=True)

    @property
    def packs(self) -> bool:
        return False

    def encode(self, sample: Sample) -> Encoded:
        question, answer = _question(sample)
        self._require_images(sample)
        if self._token in question or self._token in answer:
            raise SampleError(f"its text has '{self._token}' in it, which stands for an image.")
        sizes = [self._seen.sizes[image] for image in sample.images]
        # the processor takes no text without an image
        found = self._processed(self._token * max(1, len(sizes)) + question, sizes or [NOMINAL], suffix=[answer])
        pairs = list(zip(found["input_ids"][0], found["token_type_ids"][0], strict=True))
        if not sizes:
            pairs = [(token, kind) for token, kind in pairs if token != self._token_id]
        ids = [int(token) for token, _ in pairs]
        self._require_known(ids)
        return Encoded(array("i", ids), bytes(int(kind) for _, kind in pairs), images=sample.images)


def _question(sample: Sample) -> tuple[str, str]:
    if isinstance(sample, PlainSample):
        return sample.prompt, sample.completion
    roles = [message.role for message in sample.messages]
    if roles != ["user", "assistant"]:
        raise SampleError(
            f"this model reads one question and writes one answer; the row has turns of {', '.join(roles)}."
        )
    return sample.messages[0].content, sample.messages[1].content
