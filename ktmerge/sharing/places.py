"""What a person means by the place of a bundle: a file, a folder, a repository of the hub, an address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ktmerge.checkpoints.files import near_file
from ktmerge.errors import UsageError
from ktmerge.sharing import contents

_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PATHLIKE = ("/", "./", "../", "~")


@dataclass(frozen=True)
class Place:
    """A place by its kind.

    Attributes:
        kind: of it.
        name: path, ``org/name`` or address.
        revision: of a repository, where one is named.
    """

    kind: Literal["file", "folder", "hub", "url"]
    name: str
    revision: str | None = None


def place_of(reference: str, *, there: bool = True) -> Place:
    """What a reference means: an address, else what is here, else a repository of the hub.

    Args:
        reference: as a person gives it.
        there: whether a file or folder has to exist.

    Raises:
        UsageError: it means nothing.
    """
    if _ADDRESS.match(reference):
        return Place("url", reference)
    try:
        path = Path(reference).expanduser()
        if path.is_dir():
            return Place("folder", str(path))
        if path.exists():
            return Place("file", str(path))
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{reference}: cannot be looked up: {error}.") from None
    match = _REPOSITORY.fullmatch(reference)
    if match is not None and not reference.endswith((contents.SUFFIX, ".yaml", ".yml")):
        return Place("hub", match["name"], match["revision"])
    if there or not reference.startswith(_PATHLIKE):
        raise UsageError(
            f"{reference}: no such file or folder, and no org/name of the hub or https address.{near_file(path)}"
        )
    return Place("folder", str(path))
