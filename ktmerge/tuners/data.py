"""Training data: reads JSONL, JSON and parquet, recognises four formats, and turns every row into one kind of sample.

Knows nothing about tokens or models. All that is wrong with the files is reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ktmerge.errors import UsageError
from ktmerge.recipes.rows import Row, listing, read_rows

Role = Literal["system", "user", "assistant"]

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
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class ChatSample:
    """A conversation; the assistant turns from message ``trained_from`` on are learned."""

    messages: tuple[Message, ...]
    where: str
    trained_from: int = 0


@dataclass(frozen=True)
class PlainSample:
    """Text that goes on: ``completion`` is learned, and that the text ends there."""

    prompt: str
    completion: str
    where: str


Sample = ChatSample | PlainSample


@dataclass(frozen=True)
class DataSet:
    """The samples of one or more files, in order.

    Attributes:
        files: the names as the job gave them.
        digests: sha256 of each file.
        formats: the format of each file.
    """

    samples: list[Sample]
    files: tuple[str, ...]
    digests: tuple[str, ...]
    formats: tuple[str, ...]


class _RowError(Exception):
    """What is wrong with one row, without saying where."""


def read_data(files: Sequence[str], folder: Path, format: str = "auto") -> DataSet:
    """Read data files given relative to ``folder``.

    Raises:
        UsageError: everything that is wrong with them, the first five problems and how many there are.
    """
    problems: list[str] = []
    samples: list[Sample] = []
    digests, formats = [], []
    for file in files:
        found = read_rows(folder / file, file)
        problems += found.problems
        digests.append(found.digest)
        name = _format_of(found.rows, format, file, problems)
        formats.append(name)
        if name:
            samples += _samples(found.rows, name, problems)
    if problems:
        raise UsageError(listing(problems))
    return DataSet(samples, tuple(files), tuple(digests), tuple(formats))


def _format_of(rows: Sequence[Row], wanted: str, file: str, problems: list[str]) -> str:
    """The format of one file, by the columns of its first row; empty, with a problem noted, if there is none."""
    if not rows:
        return ""
    columns = set(rows[0].values)
    for name, needed in FORMATS.items():
        if columns.issuperset(needed) and wanted in ("auto", name):
            return name
    found = ", ".join(sorted(columns)) or "none"
    if wanted == "auto":
        problems.append(f"{file}: its columns ({found}) are in no known format. {_HELP}")
    else:
        needed = FORMATS[wanted]
        problems.append(f"{file}: format {wanted} needs the columns {', '.join(needed)}; found {found}.")
    return ""


def _samples(rows: Sequence[Row], name: str, problems: list[str]) -> list[Sample]:
    samples = []
    for row in rows:
        try:
            samples.append(_READERS[name](row.values, row.where))
        except _RowError as error:
            problems.append(f"{row.where}: {error}")
    return samples


def _read_messages(row: Mapping[str, Any], where: str) -> Sample:
    return _chat(_turns(row.get("messages"), "messages", "role", "content", _ROLES), where)


def _read_sharegpt(row: Mapping[str, Any], where: str) -> Sample:
    turns = _turns(row.get("conversations"), "conversations", "from", "value", _SHAREGPT_ROLES)
    return _chat(_system(row) + turns, where)


def _read_alpaca(row: Mapping[str, Any], where: str) -> Sample:
    instruction, given, output = _text(row, "instruction"), _text(row, "input", optional=True), _text(row, "output")
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    if not question.strip():
        raise _RowError("the instruction is empty.")
    return _chat((*_system(row), Message("user", question), Message("assistant", output)), where)


def _read_prompt_completion(row: Mapping[str, Any], where: str) -> Sample:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise _RowError("the completion is empty.")
        return PlainSample(_whole_characters(prompt), _whole_characters(completion), where)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _turns(prompt, "prompt", "role", "content", _ROLES)
        after = _turns(completion, "completion", "role", "content", _ROLES)
        return _chat(before + after, where, trained_from=len(before))
    raise _RowError("prompt and completion must both be text, or both lists of messages.")


_READERS: dict[str, Callable[[Mapping[str, Any], str], Sample]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
}


def _chat(messages: tuple[Message, ...], where: str, trained_from: int = 0) -> ChatSample:
    answers = [message for message in messages[trained_from:] if message.role == "assistant"]
    if not answers:
        raise _RowError("there is no assistant turn to learn.")
    if not all(answer.content.strip() for answer in answers):
        raise _RowError("an assistant turn is empty.")
    return ChatSample(messages, where, trained_from)


def _system(row: Mapping[str, Any]) -> tuple[Message, ...]:
    text = _text(row, "system", optional=True)
    return (Message("system", text),) if text.strip() else ()


def _text(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _RowError(f"{column} is {_kind(value)}; it must be text.")
    return _whole_characters(value)


def _turns(value: Any, column: str, role_key: str, text_key: str, roles: Mapping[str, Role]) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _RowError(f"{column} is {'empty' if value == [] else _kind(value)}; it must be a list of turns.")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            raise _RowError(f"turn {number} of {column} has no {role_key} and {text_key}.")
        role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise _RowError(
                f"turn {number} of {column} has the unknown {role_key} {turn[role_key]!r}; known: {', '.join(roles)}."
            )
        turns.append(Message(role, _content(turn[text_key], number, column)))
    return tuple(turns)


def _content(value: Any, number: int, column: str) -> str:
    """Text, given as such or as a list of text parts."""
    if isinstance(value, str):
        return _whole_characters(value)
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        return _whole_characters("".join(part["text"] for part in value))
    raise _RowError(f"the content of turn {number} of {column} is not text.")


def _whole_characters(text: str) -> str:
    """Refuse what JSON can escape but no tokenizer can read: one half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RowError(f"the text has half a character ({text[error.start]!r}) in it.") from None
    return text


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _kind(value: Any) -> str:
    names = {type(None): "missing", list: "a list", dict: "an object", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")
