"""The turns of a conversation as rows have them: roles, texts, and parts that may be images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ktmerge.recipes.images import images_of
from ktmerge.tuners.images.places import Place, Segments

Role = Literal["system", "user", "assistant"]

SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


class RowError(Exception):
    """What is wrong with one row, without saying where."""


@dataclass(frozen=True)
class Turn:
    """A turn as it was read: texts, images, and places of images that the row names elsewhere."""

    role: Role
    segments: Segments


def turns_of(
    value: Any, column: str, role_key: str, text_key: str, roles: Mapping[str, Role], root: Path
) -> list[Turn]:
    """The turns in a row's column.

    Args:
        value: what the column holds.
        column: its name, for messages.
        role_key: what a turn calls its role.
        text_key: what it calls its text.
        roles: by the words that stand for them.
        root: where paths of images start.

    Raises:
        RowError: it is no list of turns, or one of them is none.
        ImageError: a part names an image in no way that there is.
    """
    if not isinstance(value, list) or not value:
        raise RowError(f"{column} is {'empty' if value == [] else kind_of(value)}; it must be a list of turns.")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            raise RowError(f"turn {number} of {column} has no {role_key} and {text_key}.")
        role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise RowError(
                f"turn {number} of {column} has the unknown {role_key} {turn[role_key]!r}; known: {', '.join(roles)}."
            )
        turns.append(Turn(role, _content(turn[text_key], number, column, root)))
    return turns


def _content(value: Any, number: int, column: str, root: Path) -> Segments:
    """Text, given as such or as a list of parts, some of which may be images."""
    if isinstance(value, str):
        return [whole_characters(value)]
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return [segment for part in value for segment in _part(part, number, column, root)]
    raise RowError(f"the content of turn {number} of {column} is not text, nor a list of parts.")


def _part(part: Mapping[str, Any], number: int, column: str, root: Path) -> Segments:
    """One part of a message; tables fill the keys that a part does not have with null."""
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RowError(f"the text in turn {number} of {column} is {kind_of(part.get('text'))}; it must be text.")
        return [whole_characters(part["text"])]
    if kind not in ("image", "image_url"):
        raise RowError(f"the content of turn {number} of {column} is not text or an image, but {kind or 'nameless'}.")
    found = images_of(_source(part), root)
    return [*found] if found else [Place()]


def _source(part: Mapping[str, Any]) -> Any:
    """What a part of a message says of its image; nothing if the row does elsewhere."""
    source = part.get("source")
    if isinstance(source, Mapping):
        return {"bytes": source["data"]} if isinstance(source.get("data"), str) else source.get("url")
    if isinstance(part.get("base64"), str):
        return {"bytes": part["base64"]}
    if part.get("bytes") is not None:
        return part["bytes"]
    return next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None), None)


def whole_characters(text: str) -> str:
    """Refuse what JSON can escape but no tokenizer can read: one half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"the text has half a character ({text[error.start]!r}) in it.") from None
    return text


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {type(None): "missing", list: "a list", dict: "an object", str: "text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def text_of(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    """The text in a row's column; of one that is optional and missing, none.

    Raises:
        RowError: it is no text.
    """
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{column} is {kind_of(value)}; it must be text.")
    return whole_characters(value)


def system_of(row: Mapping[str, Any]) -> list[Turn]:
    """The turn that a row's ``system`` column stands for, if it has one."""
    text = text_of(row, "system", optional=True)
    return [Turn("system", [text])] if text.strip() else []
