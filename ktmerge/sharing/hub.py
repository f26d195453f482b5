"""Bundles in repositories of the Hugging Face hub: one of their own, or a folder in a model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.hub import quiet_unless_watched, refusal
from ktmerge.checkpoints.workroom import passing_room, workroom
from ktmerge.errors import KtmergeError, UsageError, first_line
from ktmerge.sharing import contents
from ktmerge.sharing.retrying import retried, status_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FOLDER = "ktmerge-recipe"
"""Where a bundle lies in a repository that is a model's."""
_BLOCK = 1 << 20
_MOST_ENTRIES = 10_000
_ATTEMPTS = 3
_REFUSALS = (401, 403, 404)

Answer = TypeVar("Answer")


class HubSource:
    """A bundle in a repository, at the commit that its revision was when it was looked at.

    Args:
        name: ``org/name``.
        revision: commit, branch or tag; None: main.
        inside: whether it lies in the folder of a model's repository; else wherever it is found.
    """

    def __init__(self, name: str, revision: str | None, *, inside: bool = False) -> None:
        self._name, self._revision, self._inside = name, revision, inside

    @property
    def where(self) -> str:
        return f"{self._name}@{self._commit}{f'/{self._folder}' if self._folder else ''}"

    def sizes(self) -> Mapping[str, int]:
        start = f"{self._folder}/" if self._folder else ""
        # A repository may have a .gitattributes, and one of a model has much else: none of it is fetched.
        own = {name[len(start) :]: size for name, size in self._listed.items() if name.startswith(start)}
        if not self._folder:
            own = {name: size for name, size in own.items() if contents.limit(name) is not None}
        contents.require_names(own, self.where)
        contents.require_sizes(own, self.where)
        return own

    def manifest(self) -> bytes:
        with workroom(passing_room("look")) as folder:
            return b"".join(self.blocks(contents.MANIFEST, folder))

    def blocks(self, name: str, folder: Path) -> Iterator[bytes]:
        inside = f"{self._folder}/{name}" if self._folder else name
        with quiet_unless_watched():
            path = Path(
                self._asked(
                    lambda api: api.hf_hub_download(self._name, inside, revision=self._commit, local_dir=folder)
                )
            )
        with clear_os_errors(path), path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield block
        path.unlink()

    @cached_property
    def _commit(self) -> str:
        info = self._asked(lambda api: api.repo_info(self._name, revision=self._revision))
        if not info.sha:
            raise KtmergeError(f"{self._name}: the hub does not say which commit this is.")
        return info.sha

    @cached_property
    def _listed(self) -> dict[str, int]:
        """Bytes of every file of the repository."""

        def listing(api: HfApi) -> dict[str, int]:
            found: dict[str, int] = {}
            for entry in api.list_repo_tree(self._name, revision=self._commit, recursive=True):
                size = getattr(entry, "size", None)
                if size is not None:
                    found[entry.path] = size
                if len(found) > _MOST_ENTRIES:
                    raise UsageError(f"{self._name}: has more than {_MOST_ENTRIES} files, and is no place of a recipe.")
            return found

        return self._asked(listing)

    @cached_property
    def _folder(self) -> str:
        """Where in the repository the bundle is."""
        places = [FOLDER] if self._inside else ["", FOLDER]
        for place in places:
            if f"{place}/{contents.MANIFEST}".lstrip("/") in self._listed:
                return place
        raise UsageError(
            f"{self._name}: has no recipe that 'ktmerge recipe push' put there (no {contents.MANIFEST} "
            f"{f'in {FOLDER}/' if self._inside else f'at its root or in {FOLDER}/'})."
        )

    def _asked(self, call: Callable[[HfApi], Answer]) -> Answer:
        return asked(self._name, self._revision, call)


def asked(name: str, revision: str | None, call: Callable[[HfApi], Answer]) -> Answer:
    """What the hub answers, asked again while it is busy.

    Raises:
        UsageError: it refuses: there is no such repository or revision, or it may not be seen or changed.
        KtmergeError: it cannot be reached, or stays busy.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # The hub's library makes most calls again by itself, and all that fail for the connection.
        return retried(lambda: call(HfApi()), name, _ATTEMPTS, broken=False)
    except KtmergeError:
        raise
    except Exception as error:
        code = status_of(error)
        if code == 429 or (code is not None and code >= 500):
            raise KtmergeError(f"{name}: the hub is busy or broken (HTTP {code}); try again later.") from error
        if code in _REFUSALS or isinstance(error, LocalEntryNotFoundError):
            kind = UsageError if code is not None else KtmergeError
            raise kind(f"{name}: {refusal(error, revision)}") from error
        told = first_line(error).rstrip(".")
        if code is not None or isinstance(error, ValueError):  # of names that the hub's library does not let through
            raise UsageError(
                f"{name}: the hub does not take this{f' (HTTP {code})' if code else ''}: {told}."
            ) from error
        raise KtmergeError(f"{name}: the hub cannot be reached: {told}.") from error
