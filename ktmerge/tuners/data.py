"""Training data: reads JSONL, JSON and parquet, recognises four formats, and turns every row into one kind of sample.

Rows of any format may have images, in a column ``images`` or ``image`` or among the parts of a message. Knows nothing
about tokens or models, nor whether images can be read. All that is wrong with the files is reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError, printable
from ktmerge.recipes.images import Image, ImageError, images_of
from ktmerge.recipes.rows import Row, listing, read_rows
from ktmerge.tuners.images.places import MARK, Placed, PlaceError, fill, joined
from ktmerge.tuners.turns import (
    ROLES,
    SHAREGPT_ROLES,
    Role,
    RowError,
    Turn,
    kind_of,
    system_of,
    text_of,
    turns_of,
    whole_characters,
)

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
"""Columns that tell a format; the first whose columns are all there wins."""

_HELP = (
    "Known formats: messages (role, content), ShareGPT (conversations: from, value), "
    "alpaca (instruction, input, output), prompt-completion (prompt, completion)."
)
_IMAGE_COLUMNS = ("images", "image")
_SHOWN = 20
"""Columns that a message names."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: its text, and the images that stand in it."""

    role: Role
    content: str
    images: Placed = ()


@dataclass(frozen=True)
class ChatSample:
    """A conversation; the assistant turns from message ``trained_from`` on are learned."""

    messages: tuple[Message, ...]
    where: str
    trained_from: int = 0

    @property
    def images(self) -> tuple[Image, ...]:
        """All images, in order."""
        return tuple(image for message in self.messages for _, image in message.images)


@dataclass(frozen=True)
class PlainSample:
    """Text that goes on: ``completion`` is learned, and that the text ends there. Images stand in the prompt."""

    prompt: str
    completion: str
    where: str
    placed: Placed = ()

    @property
    def images(self) -> tuple[Image, ...]:
        """All images, in order."""
        return tuple(image for _, image in self.placed)


Sample = ChatSample | PlainSample


@dataclass(frozen=True)
class DataSet:
    """The samples of one or more files, in order.

    Attributes:
        files: the names as the job gave them.
        digests: sha256 of each file.
        formats: the format of each file.
        sizes: the samples of each file.
    """

    samples: list[Sample]
    files: tuple[str, ...]
    digests: tuple[str, ...]
    formats: tuple[str, ...]
    sizes: tuple[int, ...] = ()


def read_data(files: Sequence[str], folder: Path, format: str = "auto", image_root: Path | None = None) -> DataSet:
    """Read data files given relative to ``folder``, and the names of their images, relative to ``image_root``.

    Images are looked for beside their data file if there is no ``image_root``. None is opened.

    Raises:
        UsageError: everything that is wrong with them, the first five problems and how many there are.
    """
    problems: list[str] = []
    samples: list[Sample] = []
    digests, formats = [], []
    sizes: list[int] = []
    for file in files:
        found = read_rows(folder / file, file)
        problems += found.problems
        digests.append(found.digest)
        name = _format_of(found.rows, format, file, problems)
        formats.append(name)
        if name:
            samples += _samples(found.rows, name, image_root or (folder / file).parent, problems)
        sizes.append(len(samples) - sum(sizes))
    if problems:
        raise UsageError(listing(problems))
    return DataSet(samples, tuple(files), tuple(digests), tuple(formats), tuple(sizes))


def _format_of(rows: Sequence[Row], wanted: str, file: str, problems: list[str]) -> str:
    """The format of one file, by the columns of its first row; empty, with a problem noted, if there is none."""
    if not rows:
        return ""
    columns = set(rows[0].values)
    for name, needed in FORMATS.items():
        if columns.issuperset(needed) and wanted in ("auto", name):
            return name
    names = [printable(column) for column in sorted(columns)]
    found = ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])]) or "none"
    if wanted == "auto":
        problems.append(f"{file}: its columns ({found}) are in no known format. {_HELP}")
    else:
        needed = FORMATS[wanted]
        problems.append(f"{file}: format {wanted} needs the columns {', '.join(needed)}; found {found}.")
    return ""


def _samples(rows: Sequence[Row], name: str, root: Path, problems: list[str]) -> list[Sample]:
    samples = []
    for row in rows:
        try:
            _require_columns(row.values, name)
            samples.append(_READERS[name](row.values, row.where, root))
        except RecursionError:
            problems.append(f"{row.where}: is nested too deeply.")
        except (RowError, ImageError, PlaceError) as error:
            problems.append(f"{row.where}: {error}")
    return samples


def _require_columns(row: Mapping[str, Any], name: str) -> None:
    missing = [column for column in FORMATS[name] if column not in row]
    if missing:
        raise RowError(f"{' and '.join(missing)} missing; the file is {name} by its first row, and all rows must be.")


def _read_messages(row: Mapping[str, Any], where: str, root: Path) -> Sample:
    turns = turns_of(row.get("messages"), "messages", "role", "content", ROLES, root)
    return _chat(turns, where, _images(row, root))


def _read_sharegpt(row: Mapping[str, Any], where: str, root: Path) -> Sample:
    turns = turns_of(row.get("conversations"), "conversations", "from", "value", SHAREGPT_ROLES, root)
    return _chat(system_of(row) + turns, where, _images(row, root))


def _read_alpaca(row: Mapping[str, Any], where: str, root: Path) -> Sample:
    instruction, output = text_of(row, "instruction"), text_of(row, "output")
    given = text_of(row, "input", optional=True)
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    if not question.strip():
        raise RowError("the instruction is empty.")
    turns = [*system_of(row), Turn("user", [question]), Turn("assistant", [output])]
    return _chat(turns, where, _images(row, root))


def _read_prompt_completion(row: Mapping[str, Any], where: str, root: Path) -> Sample:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise RowError("the completion is empty.")
        (segments,) = fill([[whole_characters(prompt)]], _images(row, root))
        text, placed = joined(segments, trim=False)
        return PlainSample(text, whole_characters(completion), where, placed)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = turns_of(prompt, "prompt", "role", "content", ROLES, root)
        after = turns_of(completion, "completion", "role", "content", ROLES, root)
        return _chat(before + after, where, _images(row, root), trained_from=len(before))
    raise RowError(
        "prompt and completion must both be text, or both lists of messages; "
        f"here they are {kind_of(prompt)} and {kind_of(completion)}."
    )


_READERS: dict[str, Callable[[Mapping[str, Any], str, Path], Sample]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _chat(turns: Sequence[Turn], where: str, images: Sequence[Image], trained_from: int = 0) -> ChatSample:
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if images and not asked:
        raise RowError("names images, but has no user turn that they could belong to.")
    filled = dict(zip(asked, fill([turns[number].segments for number in asked], images), strict=True))
    messages = []
    for number, turn in enumerate(turns):
        segments = filled.get(number, turn.segments)
        if turn.role != "user" and not all(_is_text(segment, marks=bool(images)) for segment in segments):
            raise RowError(f"the {turn.role} turn {number + 1} has an image; only user turns may have any.")
        messages.append(Message(turn.role, *joined(segments, trim=True)))
    answers = [message for message in messages[trained_from:] if message.role == "assistant"]
    if not answers:
        raise RowError("there is no assistant turn to learn.")
    if not all(answer.content.strip() for answer in answers):
        raise RowError("an assistant turn is empty.")
    return ChatSample(tuple(messages), where, trained_from)


def _is_text(segment: Any, *, marks: bool) -> bool:
    """Whether a segment is text; in a row with images also one without marks, which would stand for an image."""
    return isinstance(segment, str) and not (marks and MARK in segment)


def _images(row: Mapping[str, Any], root: Path) -> list[Image]:
    """Those that a row names beside its texts."""
    named = next((row[column] for column in _IMAGE_COLUMNS if row.get(column) is not None), None)
    return images_of(named, root)
