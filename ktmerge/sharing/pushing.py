"""The files of a bundle to where others find them."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.staging import Staging, sync_tree
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.sharing import contents
from ktmerge.sharing.archive import write_archive
from ktmerge.sharing.hub import FOLDER, asked, seen
from ktmerge.sharing.places import place_of
from ktmerge.sharing.web import put, without_query

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_EMPTY = {contents.CARD, ".gitattributes", "LICENSE"}
"""What a repository may have that holds nothing yet."""


@dataclass(frozen=True)
class Pushed:
    """Where a bundle went.

    Attributes:
        to: the place, with the commit where there is one.
        pull: the command by which others get it.
        files: that were sent, in all.
        size: of them in bytes.
    """

    to: str
    pull: str
    files: int
    size: int

    def pairs(self) -> dict[str, str]:
        """The main facts as text, for a terminal."""
        return {"pushed": f"{self.files} files, {self.size / 1e6:.2f} MB, to {self.to}", "pull it by": self.pull}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def push(
    files: Path, target: str | None, *, into: str | None = None, private: bool = False, overwrite: bool = False,
    progress: Progress = SILENT,
) -> Pushed:  # fmt: skip
    """Hand over a bundle that was checked.

    Args:
        files: a folder that has them and nothing else.
        target: ``org/name[@branch]`` on the hub, made where it is not there; a folder; an https address to PUT to.
        into: instead, a model's repository on the hub, which has to be there.
        private: of a repository that is made.
        overwrite: replace a bundle that is in the folder.
        progress: where to report.

    Raises:
        UsageError: there is no such target, or the hub refuses.
        KtmergeError: it cannot be reached or written.
    """
    place = place_of(target or str(into), there=False)
    if into is not None and place.kind != "hub":
        raise UsageError(f"{into}: is no repository of the hub; write org/name.")
    if place.kind == "file":
        raise UsageError(f"{place.name}: is a file; 'ktmerge recipe pack' writes bundles into files.")
    told = without_query(place.name) if place.kind == "url" else place.name
    sizes = {path.relative_to(files).as_posix(): path.stat().st_size for path in files.rglob("*") if path.is_file()}
    with progress.task(f"push to {told}", None):
        if place.kind == "hub":
            commit = _to_hub(files, list(sizes), place.name, place.revision, private=private, inside=into is not None)
            to = f"{place.name}@{commit}"
            command = f"ktmerge recipe pull {'--into ' if into is not None else ''}{to}"
        elif place.kind == "url":
            put(place.name, lambda archive: write_archive(archive, {name: files / name for name in sizes}))
            to, command = told, f"ktmerge recipe pull {shlex.quote(told)}"
        else:
            _to_folder(files, Path(place.name), overwrite)
            to, command = told, f"ktmerge recipe pull {shlex.quote(told)}"
    return Pushed(to, command, len(sizes), sum(sizes.values()))


def _to_hub(files: Path, names: list[str], repository: str, branch: str | None, *, private: bool, inside: bool) -> str:
    """One commit that leaves the repository with this bundle and, of another, nothing; its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if not inside:
        asked(repository, branch, lambda api: api.create_repo(repository, private=private or None, exist_ok=True))
    start = f"{FOLDER}/" if inside else ""
    wanted = {start + name for name in names}

    def commit(api: HfApi) -> str:
        found = seen(api, repository, branch)
        there = {one.rfilename for one in found.siblings or []}
        own = {name for name in there if name.startswith(start) and contents.limit(name[len(start) :]) is not None}
        if not inside and there - _EMPTY and contents.MANIFEST not in own:
            raise UsageError(f"{repository}: holds something else than a recipe; put the recipe into it with --into.")
        if private and not found.private:
            raise UsageError(f"{repository}: is there already, and public; make it private in its settings first.")
        operations: list[Any] = [CommitOperationAdd(start + name, str(files / name)) for name in sorted(names)]
        operations += [CommitOperationDelete(name) for name in sorted(own - wanted)]
        # If another push comes between, the hub refuses this one, which then looks anew: no mixture of both is left.
        done = api.create_commit(
            repository, operations, commit_message="Recipe packed by ktmerge", revision=branch,
            parent_commit=found.sha, num_threads=2,
        )  # fmt: skip
        return str(done.oid)

    return asked(repository, branch, commit, sends=True)


def _to_folder(files: Path, out: Path, overwrite: bool) -> None:
    staging = Staging(out, overwrite)
    staging.open()
    try:
        with clear_os_errors(staging.folder):
            shutil.copytree(files, staging.folder, dirs_exist_ok=True)
            sync_tree(staging.folder)
        staging.publish()
    finally:
        staging.discard()
