"""Bundles in repositories of the Hugging Face hub: one of their own, or a folder in a model's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from http.client import HTTPResponse
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.hub import quiet_unless_watched, refusal
from ktmerge.checkpoints.workroom import passing_room, workroom
from ktmerge.errors import KtmergeError, UsageError, first_line
from ktmerge.progress import SILENT, Step
from ktmerge.sharing import contents
from ktmerge.sharing.fetching import Remote, place_for
from ktmerge.sharing.retrying import PASSING, is_of_the_net, retried, status_of
from ktmerge.sharing.source import FolderSource
from ktmerge.sharing.web import asked_server, opened_there, without_query

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

FOLDER = "ktmerge-recipe"
"""Where a bundle lies in a repository that is a model's."""
_MOST_ENTRIES = 10_000
_ATTEMPTS = 3
_REFUSALS = (401, 403)
_SECONDS, _LONGEST = 60.0, 300.0
"""Most that is waited for the hub to say anything, and all that is no file; its library would wait for ever."""

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
        with workroom(passing_room("look")) as folder, SILENT.task("", None) as step:
            return self._file(contents.MANIFEST, folder / contents.MANIFEST, step).read_bytes()

    def blocks(self, name: str) -> Iterator[bytes]:
        raise KtmergeError(f"{self.where}: was not fetched.")

    def fetched(self, folder: Path, step: Step) -> FolderSource:
        """All files, in a folder of ours, where an earlier process may have left some."""
        place = place_for(folder, self.where)
        for name in self.sizes():
            self._file(name, place / name, step)
        found = FolderSource(place)
        found.where = self.where
        return found

    def _file(self, name: str, target: Path, step: Step) -> Path:
        """Fetch a file. The hub's library would begin it anew each time, and wait for ever where it drips."""
        import huggingface_hub.utils
        from huggingface_hub import hf_hub_url

        library: Any = huggingface_hub.utils
        inside = f"{self._folder}/{name}" if self._folder else name
        url = hf_hub_url(self._name, inside, revision=self._seen.sha)

        def ask(headers: Mapping[str, str]) -> HTTPResponse:
            # Anew for each attempt, as addresses of large files are signed for an hour or so.
            address = self._asked(lambda api: api.get_hf_file_metadata(url=url)).location
            is_hub = urlsplit(address).netloc == urlsplit(url).netloc
            own = {one: value for one, value in library.build_hf_headers().items() if is_hub and one == "authorization"}
            return opened_there(address, headers, _require_web, own=own)

        with clear_os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        where = f"{self._name}/{inside}"
        size = self._listed[inside]
        Remote(where, size, None, ask, lambda call: asked_server(call, where)).fetch(target, step)
        return target

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


def asked(name: str, revision: str | None, call: Callable[[HfApi], Answer], *, sends: bool = False) -> Answer:
    """What the hub answers, asked again while it is busy, and where the connection broke.

    Args:
        name: ``org/name``.
        revision: that it is asked about.
        call: asks.
        sends: whether it sends files, which takes as long as it takes.

    Raises:
        UsageError: it refuses: there is no such repository or revision, or it may not be seen or changed.
        KtmergeError: it cannot be reached, or stays busy.
    """
    from huggingface_hub import HfApi

    def attempt() -> Answer:
        with quiet_unless_watched(), _patience():
            return call(HfApi())

    def in_time() -> Answer:
        return attempt() if sends else _ended(attempt, _LONGEST, name)

    try:
        return retried(in_time, name, _ATTEMPTS)
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


def _ended(call: Callable[[], Answer], seconds: float, name: str) -> Answer:
    """What a call gives, but not for ever: whoever drips an answer never is silent for long.

    Raises:
        KtmergeError: it takes too long; it is left to itself.
    """
    answers: SimpleQueue[tuple[Answer | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except Empty:
        raise KtmergeError(f"{name}: the hub did not end its answer in {seconds:g} seconds; given up.") from None
    if error is not None:
        raise error
    return cast("Answer", found)


def _require_web(address: str, redirected_by: str) -> None:
    """Follow the hub anywhere but out of the web, or out of its encryption."""
    scheme = urlsplit(address).scheme
    if scheme not in ("https", urlsplit(redirected_by).scheme):
        raise UsageError(f"{without_query(redirected_by)} leads to {without_query(address)}: that is not followed.")


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
