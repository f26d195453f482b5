"""Bundles in repositories of the Hugging Face hub: one of their own, or a folder in a model's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.hub import quiet_unless_watched, refusal
from ktmerge.checkpoints.workroom import passing_room, workroom
from ktmerge.errors import KtmergeError, UsageError, first_line
from ktmerge.sharing import contents
from ktmerge.sharing.retrying import PASSING, is_of_the_net, retried, status_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

FOLDER = "ktmerge-recipe"
"""Where a bundle lies in a repository that is a model's."""
_BLOCK = 1 << 20
_MOST_ENTRIES = 10_000
_ATTEMPTS = 3
_REFUSALS = (401, 403)
_SECONDS = 60.0
"""Most that is waited for the hub to say anything; its library would wait for ever."""

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
        return f"{self._name}@{self._seen.sha}{f'/{self._folder}' if self._folder else ''}"

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
        path = Path(
            self._asked(lambda api: api.hf_hub_download(self._name, inside, revision=self._seen.sha, local_dir=folder))
        )
        with clear_os_errors(path), path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield block
        path.unlink()

    @cached_property
    def _seen(self) -> ModelInfo:
        """The repository at one commit, with its files: a branch may move on."""
        found = self._asked(lambda api: seen(api, self._name, self._revision, sizes=True))
        if not found.sha:
            raise KtmergeError(f"{self._name}: the hub does not say which commit this is.")
        return found

    @cached_property
    def _listed(self) -> dict[str, int]:
        """Bytes of every file of the repository."""
        files = self._seen.siblings or []
        if len(files) > _MOST_ENTRIES:
            raise UsageError(f"{self._name}: has more than {_MOST_ENTRIES} files, and is no place of a recipe.")
        found = {one.rfilename: one.size for one in files if one.size is not None}
        if len(found) < len(files):
            raise KtmergeError(f"{self._name}: the hub does not say how large its files are.")
        return found

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


def seen(api: HfApi, name: str, revision: str | None, *, sizes: bool = False) -> ModelInfo:
    """What the hub tells of a model's repository: its commit, its files, who may see it."""
    return api.model_info(name, revision=revision, files_metadata=sizes, timeout=_SECONDS)


def asked(name: str, revision: str | None, call: Callable[[HfApi], Answer]) -> Answer:
    """What the hub answers, asked again while it is busy, and where the connection broke.

    Raises:
        UsageError: it refuses: there is no such repository or revision, or it may not be seen or changed.
        KtmergeError: it cannot be reached, or stays busy.
    """
    from huggingface_hub import HfApi

    def attempt() -> Answer:
        with quiet_unless_watched(), _patience():
            return call(HfApi())

    try:
        return retried(attempt, name, _ATTEMPTS)
    except KtmergeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not is_of_the_net(error):  # of what is written here
            with clear_os_errors(Path(error.filename or name)):
                raise
        raise _failure(error, name, revision) from error


def _failure(error: Exception, name: str, revision: str | None) -> KtmergeError:
    """What an error of the hub, or of its library, means to whoever asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why its library looked into its cache, or gave an upload up
    code, told = status_of(error), first_line(error).rstrip(".")
    if code is not None and (code in PASSING or code >= 500):
        return KtmergeError(f"{name}: the hub is busy or broken (HTTP {code}); try again later.")
    if code in _REFUSALS or isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return UsageError(f"{name}: {refusal(error, revision)}")
    if isinstance(error, LocalEntryNotFoundError):
        return KtmergeError(f"{name}: {refusal(error, revision)}")
    if isinstance(error, json.JSONDecodeError):
        return KtmergeError(
            f"{name}: what answers is not the hub: it sends a page where data are asked for. The network may want you "
            "to log in, or HF_ENDPOINT be wrong."
        )
    if code is not None or isinstance(error, ValueError):  # of names that the hub's library does not let through
        return UsageError(f"{name}: the hub does not take this{f' (HTTP {code})' if code else ''}: {told}.")
    if is_of_the_net(error):
        return KtmergeError(f"{name}: the hub cannot be reached: {told}.")
    return KtmergeError(f"{name}: what the hub sends cannot be used: {type(error).__name__}: {told}.")


@contextmanager
def _patience() -> Iterator[None]:
    """With an end to the waiting of all calls that the hub's library makes."""
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, _SECONDS
    try:
        yield
    finally:
        session.timeout = before
