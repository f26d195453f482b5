"""What earlier blends of the same inputs found out about their deltas, on disk: thresholds, and samples of magnitudes.

Kept below the cache folder by the sha256 of the inputs. The same trim again, say with another lambda, needs no look at
the weights before the blend; another density needs no sample. What is recalled is held against the blend that uses it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.checkpoints.digests import FileDigest, input_files, recalled
from ktmerge.checkpoints.files import write_whole
from ktmerge.errors import KtmergeError
from ktmerge.merge.kernels.search import Threshold
from ktmerge.merge.record import inputs_of, said_of_inputs
from ktmerge.merge.selection import Recollected, Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.merge.plan import Plan

_VERSION = 2
"""Of the file, and of what decides a threshold: the generator, the hash, what a trim means."""
_MOST = 64
"""Files that are kept."""


class Recollection:
    """Thresholds and samples of one set of inputs; empty if nothing is known of them.

    Args:
        plan: of the blend.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.found = Recollected()
        digests = {name: _recalled(checkpoint) for name, checkpoint in inputs_of(plan).items()}
        if all(digests.values()):
            self._read(_place(plan, digests))

    def keep(self, digests: Mapping[str, Mapping[str, FileDigest]]) -> None:
        """Leave what was found for later; a disk that does not take it costs only time.

        Args:
            digests: of the inputs' files, by input.
        """
        if not self.found.is_new:
            return
        import numpy as np

        place = _place(self._plan, digests)
        thresholds = [
            [list(key), [[astuple(kept), outliers and astuple(outliers)] for kept, outliers in one]]
            for key, one in self.found.thresholds.items()
        ]
        samples = [
            [list(key), [(one.size, one.edges.size) for one in found]] for key, found in self.found.samples.items()
        ]
        text = np.frombuffer(json.dumps([thresholds, samples]).encode(), np.uint8)
        every = [(one.edges, one.below) for found in self.found.samples.values() for one in found]
        tables = np.concatenate([np.zeros((2, 0), np.uint32), *every], axis=1)
        content = io.BytesIO()
        np.savez(content, text=text, samples=tables)
        with suppress(OSError, KtmergeError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, content.getvalue(), sync=False)
            # Also what killed runs left half written.
            for old in sorted(place.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-_MOST]:
                old.unlink()

    def _read(self, place: Path) -> None:
        if not place.exists():
            return
        import numpy as np

        with (
            suppress(Exception),  # whatever is wrong with it, it is only a memory
            np.load(place, allow_pickle=False) as stored,
        ):
            thresholds, samples = json.loads(stored["text"].tobytes())
            ends = np.cumsum([wide for _, every in samples for _, wide in every])
            tables = iter(np.split(stored["samples"], ends, axis=1))
            self.found = Recollected(
                {_key(key): [_threshold(one) for one in found] for key, found in thresholds},
                {_key(key): [_sample(next(tables), size) for size, _ in every] for key, every in samples},
            )


def _sample(table: NDArray[np.uint32], size: int) -> Sample:
    return Sample(table[0], table[1], size)


def _recalled(checkpoint: Checkpoint) -> dict[str, FileDigest] | None:
    """The digests of a checkpoint's files, if all were worked out before."""
    found = {name: recalled(path) for name, path in input_files(checkpoint).items()}
    return {name: one for name, one in found.items() if one is not None} if all(found.values()) else None


def _place(plan: Plan, digests: Mapping[str, Mapping[str, FileDigest] | None]) -> Path:
    """By all that decides the values of the deltas, and the random choices."""
    said, output = said_of_inputs(plan.recipe)
    files = {name: {file: one.sha256 for file, one in (found or {}).items()} for name, found in digests.items()}
    text = json.dumps([_VERSION, plan.recipe.seed, said, output, files], sort_keys=True)
    return cache_folder() / "thresholds" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def _key(parts: list[Any]) -> tuple[str, Any]:
    prefix, names = parts
    return prefix, tuple(names) if isinstance(names, list) else names


def _threshold(pair: list[Any]) -> tuple[Threshold, Threshold | None]:
    kept, outliers = pair
    return Threshold(*kept), None if outliers is None else Threshold(*outliers)
