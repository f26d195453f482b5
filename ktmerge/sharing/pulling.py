"""From what a person calls a bundle to where it comes from."""

from __future__ import annotations

from pathlib import Path

from ktmerge.errors import UsageError
from ktmerge.sharing.places import place_of
from ktmerge.sharing.source import ArchiveSource, FolderSource, Source


def source_of(reference: str, into: str | None = None) -> Source:
    """Where the bundle comes from that ``reference`` means.

    Args:
        reference: file, folder, ``org/name[@revision]`` or https address; empty with ``into``.
        into: a model's repository on the hub, ``org/name[@revision]``, that has the bundle in a folder.

    Raises:
        UsageError: it means nothing, or is not there.
        KtmergeError: the place cannot be reached.
    """
    if bool(reference) == (into is not None):
        raise UsageError(
            "give either a place (org/name, folder, file or address), or --into with a model's repo, org/name."
        )
    place = place_of(reference or str(into))
    if into is not None and place.kind != "hub":
        raise UsageError(f"{into}: is no repository of the hub; write org/name.")
    if place.kind == "url":
        from ktmerge.sharing.web import UrlSource

        return UrlSource(place.name)
    if place.kind == "hub":
        from ktmerge.sharing.hub import HubSource

        return HubSource(place.name, place.revision, inside=into is not None)
    return FolderSource(Path(place.name)) if place.kind == "folder" else ArchiveSource(Path(place.name))
