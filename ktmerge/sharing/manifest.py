"""``ktmerge-bundle.json``: every other file of a bundle by size and sha256, and every input of its recipe likewise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ktmerge.checkpoints.regular import once
from ktmerge.errors import UsageError, printable
from ktmerge.sharing import contents

VERSION = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """Size in bytes, and sha256."""

    size: int = Field(ge=0, lt=1 << 50)
    sha256: Sha256

    @classmethod
    def of(cls, raw: bytes) -> FileEntry:
        """That of some bytes."""
        return cls(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())


class Input(_Strict):
    """A model that the recipe blends.

    Attributes:
        model: ``org/name@commit``; of a folder that was not on the hub, a name made from its files' digests.
        files: that decide what it is.
    """

    model: str = Field(min_length=1, max_length=1000)
    files: dict[str, FileEntry] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """sha256 over the contents of all files, whatever they are called."""
        found = sorted((one.sha256, one.size) for one in self.files.values())
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(one.size for one in self.files.values())


class Manifest(_Strict):
    """What a bundle says of itself.

    Attributes:
        ktmerge_bundle: version of this format.
        ktmerge: version that packed it.
        name: the recipe's.
        description: the recipe's.
        method: how it blends, in a word.
        files: all others of the bundle, by name.
        inputs: ``base`` and experts, by name.
        statistics: digests of those that the recipe needs, by ``base`` or expert.
    """

    ktmerge_bundle: Literal[1] = 1
    ktmerge: str = Field(max_length=100)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)
    description: str = Field("", max_length=2000)
    method: str = Field("", max_length=200)
    files: dict[str, FileEntry]
    inputs: dict[str, Input] = Field(min_length=1)
    statistics: dict[str, str] = Field(default_factory=dict)

    def text(self) -> str:
        """As JSON; the same bundle gives the same text."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file it names."""
        return {name: one.size for name, one in self.files.items()}


def read_manifest(raw: bytes, where: str) -> Manifest:
    """A manifest from its bytes.

    Raises:
        UsageError: it is none, a newer ktmerge wrote it, or what it names is no bundle.
    """
    try:
        document: Any = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{where}: its {contents.MANIFEST} is no JSON, or has a key twice; the bundle is broken."
        ) from None
    version = document.get("ktmerge_bundle") if isinstance(document, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise UsageError(f"{where}: its {contents.MANIFEST} is no manifest of a bundle.")
    if version > VERSION:
        raise UsageError(f"{where}: a bundle of version {version}, this ktmerge knows {VERSION}; upgrade ktmerge.")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise UsageError(
            f"{where}: its {contents.MANIFEST} is broken at '{printable(key[:200])}': {problem['msg']}."
        ) from None
    if contents.MANIFEST in manifest.files:
        raise UsageError(f"{where}: its {contents.MANIFEST} names itself; the bundle is broken.")
    contents.require_names([contents.MANIFEST, *manifest.files], where)
    contents.require_sizes(manifest.sizes, where)
    return manifest
