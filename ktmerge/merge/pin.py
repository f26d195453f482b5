"""What an unfinished output is pinned to: all that its bytes depend on, the identity of every input file included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktmerge.checkpoints.digests import digest_of, holds_still, is_remembered, recalled
from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.header import FileStamp
from ktmerge.checkpoints.inheritance import differing
from ktmerge.merge.lock import files_of
from ktmerge.merge.plan import Plan
from ktmerge.merge.record import origin

_FILES = "input files"
_SHOWN = 3


class Pin:
    """What the blend of ``plan`` is pinned to.

    Raises:
        KtmergeError: an input file is not there any more.
    """

    def __init__(self, plan: Plan) -> None:
        self._paths = {f"{name}/{file}": path for name, files in files_of(plan).items() for file, path in files.items()}
        stamps = {}
        for file, path in self._paths.items():
            with clear_os_errors(path):
                stamps[file] = vars(FileStamp.of(path.stat()))
        self.document: dict[str, Any] = {**origin(plan), _FILES: stamps}

    def look_again(self) -> None:
        """Read every file that was touched since its sha256 was worked out: `departure` then knows without reading.

        Raises:
            KtmergeError: one cannot be read, or changes meanwhile.
        """
        for path in filter(is_remembered, self._paths.values()):
            digest_of(path)

    def departure(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
        """How the blend that left something was another than this one, in words; empty if it was the same.

        A file may have been touched, copied or given other permissions, where its bytes are known to be the same.
        """
        without_files = [{key: value for key, value in one.items() if key != _FILES} for one in (theirs, ours)]
        if said := differing(*without_files):
            return said
        before, after = theirs[_FILES], ours[_FILES]
        every = [self._changed(file, before.get(file), after.get(file)) for file in {**before, **after}]
        changed = [said for said in every if said]
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        return f"{_FILES} ({', '.join(changed[:_SHOWN])}{more})" if changed else ""

    def _changed(self, file: str, before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> str:
        if before == after:
            return ""
        if before is None or after is None:
            return f"{file} is {'new' if before is None else 'gone'}"
        path, stamp = self._paths[file], FileStamp(**before)
        if stamp.size == after["size"] and recalled(path, stamp) is None:
            return f"{file} was touched or written, and its bytes of before are not known"
        return "" if stamp.size == after["size"] and holds_still(path, stamp) else f"{file} has other bytes"
