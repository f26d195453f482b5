"""Reads every image of the data once, before anything is trained: what is wrong with any of them is told together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ktmerge.checkpoints.workers import Workers
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.images import Image, ImageError, require_pillow
from ktmerge.recipes.rows import listing
from ktmerge.tuners.data import Sample

_SHOWN = 100
"""Problems to tell: files that are missing are looked for by their names."""


@dataclass(frozen=True)
class Seen:
    """What is known of images that were read.

    Attributes:
        sizes: width and height of each, upright.
        digests: sha256 of the content of each.
    """

    sizes: Mapping[Image, tuple[int, int]] = field(default_factory=dict)
    digests: Mapping[Image, str] = field(default_factory=dict)

    def digest(self, samples: Sequence[Sample]) -> str:
        """One sha256 for all images of samples, in order."""
        digest = hashlib.sha256()
        for sample in samples:
            digest.update(f"{len(sample.images)}:".encode())
            for image in sample.images:
                digest.update(bytes.fromhex(self.digests[image]))
        return digest.hexdigest()


def has_images(samples: Iterable[Sample]) -> bool:
    """Whether any sample has an image."""
    return any(sample.images for sample in samples)


def look_at(samples: Sequence[Sample], progress: Progress = SILENT) -> Seen:
    """Read all images of samples, each once, on all cores; none is kept in memory.

    Raises:
        UsageError: images that are missing or broken, with file and row: the first hundred and how many more.
    """
    if not has_images(samples):
        return Seen()
    require_pillow()
    images = list(dict.fromkeys(image for sample in samples for image in sample.images))
    sizes: dict[Image, tuple[int, int]] = {}
    digests: dict[Image, str] = {}
    wrong: dict[Image, str] = {}
    with (
        progress.task("reading images", len(images), "items") as step,
        Workers(os.cpu_count() or 1) as pool,
    ):
        for image, found in zip(images, pool.map(_look, images), strict=True):
            step.advance()
            if isinstance(found, str):
                wrong[image] = found
            else:
                sizes[image], digests[image] = found
    if wrong:
        raise UsageError(_report(samples, wrong, len(images)))
    return Seen(sizes, digests)


def _look(image: Image) -> tuple[tuple[int, int], str] | str:
    """Size and digest, or what is wrong."""
    try:
        width, height = image.open().size
        return (width, height), image.digest()
    except ImageError as error:
        return str(error)


def _report(samples: Sequence[Sample], wrong: Mapping[Image, str], there: int) -> str:
    problems = [f"{sample.where}: {wrong[image]}" for sample in samples for image in sample.images if image in wrong]
    return (
        f"{len(wrong)} of {there} images cannot be used.\n{listing(problems, _SHOWN)}\n"
        "Mend them, or leave their rows out; paths start at image_root (--image-root), or where the data file is."
    )
