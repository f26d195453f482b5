"""From what a recipe calls a model (a folder, a hub id) to a folder on this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError, did_you_mean

_HUB_ID = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?$")
_CACHED = re.compile(r"/models--(?P<organisation>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
# What a checkpoint needs; not the same weights again in other formats.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "*.tiktoken", "LICENSE*"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*.onnx", "checkpoint-*"]


def resolve(reference: str, folder: Path) -> Path:
    """The folder that ``reference`` means: a path (relative to ``folder``), else a hub id ``org/name[@revision]``.

    A hub id is downloaded once into the hub's own cache.

    Raises:
        UsageError: it is neither, or the hub doesn't give it (offline, unknown, gated).
    """
    try:
        path = Path(folder) / Path(reference).expanduser()
        if path.is_dir():
            if not os.access(path, os.R_OK | os.X_OK):
                raise UsageError(f"{reference}: no permission to read this folder.")
            return path
        taken = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder not to be entered, an unknown ~user
        raise UsageError(f"{reference}: cannot be looked up: {str(error).rstrip('.')}.") from None
    if "://" in reference and not taken:
        raise UsageError(f"{reference}: is an address; name a folder, or a hub id such as org/name.")
    if taken:
        raise UsageError(f"{reference}: is a file; give the folder of the checkpoint.")
    match = _HUB_ID.match(reference)
    if match is None:
        raise UsageError(f"{reference}: no such folder (looked for {path}).{_sibling(path)}")
    if match["revision"] is None and path.parent.is_dir():
        hub = f"If the hub is meant, write {reference}@main."
        raise UsageError(f"{reference}: no such folder (looked for {path}).{_sibling(path)} {hub}")
    return _download(match["name"], match["revision"])


def hub_name(reference: str, folder: Path) -> str | None:
    """``org/name`` if `resolve` takes the reference from the hub; None if it means a folder here."""
    match = _HUB_ID.match(reference)
    return None if match is None or is_folder(reference, folder) else match["name"]


def is_folder(reference: str, folder: Path) -> bool:
    """Whether a reference means a folder here; False, too, where it cannot be looked up: `resolve` says why."""
    try:
        return (folder / Path(reference).expanduser()).is_dir()
    except (OSError, RuntimeError):
        return False


def on_this_machine(reference: str, folder: Path) -> str | None:
    """A reference to the same model that fetches nothing: hub ids become their folders in the hub's cache.

    Returns:
        None if one of them was never fetched.
    """
    if is_folder(reference, folder):
        return reference
    found = [_cached(one, folder) for one in reference.split("+")]
    return None if None in found else "+".join(map(str, found))


def cached_as(root: Path) -> str | None:
    """``org/name@commit`` of a folder in the hub's cache, ``models--org--name/snapshots/commit``; None of others."""
    match = _CACHED.search(root.as_posix())
    return match and f"{match['organisation']}/{match['name']}@{match['commit']}"


def _sibling(path: Path) -> str:
    try:
        siblings = [child.name for child in path.parent.iterdir() if child.is_dir()]
    except OSError:
        return f" {path.parent} does not exist either." if not path.parent.exists() else ""
    return did_you_mean(path.name, siblings, list_all=False)


def _cached(reference: str, folder: Path) -> str | None:
    if hub_name(reference, folder) is None:
        return reference
    from huggingface_hub import errors, snapshot_download

    name, _, revision = reference.partition("@")
    try:
        return str(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (errors.LocalEntryNotFoundError, ValueError):
        return None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with quiet_unless_watched():
            found = snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except Exception as error:
        raise UsageError(f"{name}: no such folder here, and the model {refusal(error, revision)}") from error
    return Path(found)


@contextmanager
def quiet_unless_watched() -> Iterator[None]:
    """Without the hub's progress bars where nobody sees them move."""
    import huggingface_hub.utils

    bars: Any = huggingface_hub.utils
    hide = not sys.stderr.isatty() and not bars.are_progress_bars_disabled()
    if hide:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bars()


def refusal(error: Exception, revision: str | None) -> str:
    """Why the hub, or its library, did not give or take something: the end of a sentence."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is gated on the hub; accept its terms there and log in with `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision '{revision}' on the hub."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the hub, or is private; check the name, or log in with `hf auth login`."
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"is refused by the hub (HTTP {error.response.status_code}); log in with `hf auth login`."
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return "is not in the local cache, and the hub cannot be reached."
    if isinstance(error, OSError) and error.strerror:
        return f"could not be downloaded: {error.strerror}."
    return f"could not be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
