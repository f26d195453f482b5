"""The sets of a run in the tokens of every model of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.limits import context_length
from ktmerge.errors import UsageError
from ktmerge.eval.encode import Encoded, has_images
from ktmerge.eval.fingerprints import date_in, fingerprint
from ktmerge.eval.loading import load_sight, load_tokenizer, tokenizer_files_digest
from ktmerge.eval.sets import TaskSet, encode_sets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight


@dataclass(frozen=True)
class Encoding:
    """The sets in one tokenizer's tokens."""

    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tasks: dict[str, Encoded]
    sight: Sight | None = None


class Encodings:
    """The encoding of each model; made once for all models with the same tokenizer.

    Args:
        sets: what is scored.
        checkpoints: of the models, by name.
        base: name of the one that all are compared with.

    Attributes:
        max_length: of the shortest context among the models; None where none says.
        warnings: what to know of prompts and tokenizers.
        of: by model.

    Raises:
        UsageError: something doesn't fit a tokenizer or a context, or models would be asked different items.
    """

    def __init__(self, sets: Sequence[TaskSet], checkpoints: Mapping[str, Checkpoint], base: str) -> None:
        lengths = [context_length(checkpoint.config) for checkpoint in checkpoints.values()]
        max_length = min((length for length in lengths if length is not None), default=None)
        self.max_length = max_length
        self.warnings: list[str] = []
        self.of: dict[str, Encoding] = {}
        by_files: dict[str, Encoding] = {}
        by_rules: dict[str, Encoding] = {}
        seeing = any(has_images(item) for one in sets for item in one.items)
        for name, checkpoint in checkpoints.items():
            files = tokenizer_files_digest(checkpoint.root)
            if files not in by_files:
                tokenizer = load_tokenizer(checkpoint.root)
                sight = load_sight(checkpoint.root) if seeing else None
                rules = fingerprint(tokenizer, sight)
                if rules not in by_rules:
                    encoded = encode_sets(sets, tokenizer, max_length, sight)
                    by_rules[rules] = Encoding(tokenizer, rules, encoded, sight)
                by_files[files] = by_rules[rules]
            self.of[name] = by_files[files]
        self._warn(sets, base)

    def _warn(self, sets: Sequence[TaskSet], base: str) -> None:
        own = self.of[base]
        for name, encoding in self.of.items():
            if encoding.fingerprint != own.fingerprint:
                self.warnings.append(
                    f"'{name}' has another tokenizer or chat template than '{base}' and is scored with its own: "
                    "prompts may differ, and next-token accuracy does not compare (perplexity per byte does)."
                )
        if date_in(own.tokenizer.chat_template) and any(getattr(one.task, "chat", False) for one in sets):
            self.warnings.append(
                f"the chat template of '{base}' writes today's date into prompts: runs of other days ask otherwise."
            )
        distinct = {id(encoding): (name, encoding) for name, encoding in reversed(self.of.items())}
        for one in sets:
            for name, encoding in reversed(distinct.values()):
                encoded, whose = encoding.tasks[one.task.name], "" if encoding is own else f" of '{name}'"
                if encoded.truncated:
                    self.warnings.append(
                        f"task '{one.task.name}': {encoded.truncated} prompts{whose} were cut to fit the model."
                    )
                if encoded.skipped:
                    self.warnings.append(
                        f"task '{one.task.name}': {encoded.skipped} rows{whose} are too short to score."
                    )
        self._refuse_uneven(sets, base)

    def _refuse_uneven(self, sets: Sequence[TaskSet], base: str) -> None:
        """Items pair up only if every tokenizer cuts a text into as many chunks."""
        for one in sets:
            wanted = self.of[base].tasks[one.task.name].rows
            for name, encoding in self.of.items():
                if encoding.tasks[one.task.name].rows != wanted:
                    raise UsageError(
                        f"task '{one.task.name}': '{name}' has another tokenizer than '{base}' and cuts the texts into "
                        "other chunks, so the two cannot be compared item by item; give it the base's tokenizer."
                    )
