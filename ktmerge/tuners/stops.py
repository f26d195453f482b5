"""What ends an answer: the stop token that its template writes, and where to say one if it writes none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.layout import read_config
from ktmerge.errors import UsageError
from ktmerge.tuners.tokens import Run


class Stops:
    """The tokens that end a text of one model.

    Args:
        tokenizer: a transformers tokenizer.
        ids: by the model's own configuration; the first is said where a text has none.

    Attributes:
        added: tokens beside the vocabulary, which a template may end its turns with.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.ids = tuple(ids)
        self.added = frozenset(tokenizer.get_added_vocab().values())
        self._blank: dict[int, bool] = {}

    def mark(self, ids: list[int], runs: list[Run]) -> tuple[list[int], list[bool]]:
        """Mark the answers; end each with the stop token that follows, or with one of our own if the text just ends."""
        # what opens every turn is an added token too, but ends nothing
        stops = {*self.ids, *(self.added - set(ids[:2]))}
        trained = [False] * len(ids)
        for run in runs:
            end = self._stop_after(ids, run, stops)
            if end is None:
                end = len(ids)
                while end > run.content_end and self._is_blank(ids[end - 1]):
                    end -= 1
                ids, trained = [*ids[:end], self.ids[0]], [*trained[:end], True]
            trained[run.first : end] = [True] * (end - run.first)
        return ids, trained

    def _stop_after(self, ids: list[int], run: Run, stops: set[int]) -> int | None:
        """One past the last token to train; None where the text ends without a stop."""
        marked = self._marked_stop(ids, run, stops) if run.content_end == run.end else None
        if marked is not None:
            return marked
        for number in range(run.content_end, run.end):
            if ids[number] in stops:
                return self._last_of_several(ids, number, run.end, stops) + 1
        number = run.end
        while number < len(ids) and ids[number] not in stops and self._is_blank(ids[number]):
            number += 1
        if number == len(ids):
            return None
        return number + 1 if ids[number] in stops else run.end

    def _last_of_several(self, ids: list[int], number: int, end: int, stops: set[int]) -> int:
        """Some templates close the answer and then the turn, with one token each."""
        while ids[number] not in self.ids and number + 1 < end and ids[number + 1] in stops:
            number += 1
        return number

    def _marked_stop(self, ids: list[int], run: Run, stops: set[int]) -> int | None:
        """One past the stop token that the template's own marks include, if any; a line end after it is no answer."""
        last = run.end - 1
        while last > run.first and self._is_blank(ids[last]):
            last -= 1
        return last + 1 if ids[last] in stops else None

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def stop_ids(tokenizer: Any, base: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """What ends a text, by the tokenizer, then the files of the checkpoint folder ``base``.

    Raises:
        UsageError: neither says.
    """
    generation = read_config(base, "generation_config.json")
    found: list[int] = []
    for named in (tokenizer.eos_token_id, generation.get("eos_token_id"), config.get("eos_token_id")):
        found += [named] if isinstance(named, int) else [one for one in named or () if isinstance(one, int)]
    if not found:
        raise UsageError(f"{base}: neither tokenizer nor configuration names the token that ends a text (eos).")
    return tuple(dict.fromkeys(found))
