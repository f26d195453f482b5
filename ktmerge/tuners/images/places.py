"""Where the images of a row stand in its texts: at ``<image>``, at a part without content of its own, or before all.

Knows nothing of files, formats or models.
"""

from __future__ import annotations

from collections.abc import Sequence

from ktmerge.recipes.images import Image

MARK = "<image>"
"""What stands for an image in texts, as in LLaVA's data, whatever token the model has for it."""
Placed = tuple[tuple[int, Image], ...]
"""Images in a text: before which of its characters each stands."""


class Place:
    """Stands for an image that is named elsewhere in the row."""


Segments = list["str | Image | Place"]
"""A text with its images, in order."""


class PlaceError(Exception):
    """Why images and their places do not fit, without saying in which row."""


def marked(segments: Segments) -> Segments:
    """The same with a `Place` for every `MARK` in its texts."""
    found: Segments = []
    for segment in segments:
        if not isinstance(segment, str):
            found.append(segment)
            continue
        for number, text in enumerate(segment.split(MARK)):
            found += [Place(), text] if number else [text]
    return found


def fill(texts: Sequence[Segments], images: Sequence[Image]) -> list[Segments]:
    """The texts with a row's images in their places; if there are no places, all of them before the first text.

    Raises:
        PlaceError: there are more or fewer places than images.
    """
    bare = sum(isinstance(segment, Place) for text in texts for segment in text)
    if not images:
        if bare:
            raise PlaceError(f"has {bare} parts of type image, but names no image.")
        return list(texts)
    found = [marked(text) for text in texts]
    places = sum(isinstance(segment, Place) for text in found for segment in text)
    if not places:
        return [[*images, *found[0]], *found[1:]]
    if places != len(images):
        raise PlaceError(f"names {len(images)} images, but its texts have places ({MARK}) for {places}.")
    rest = iter(images)
    return [[next(rest) if isinstance(segment, Place) else segment for segment in text] for text in found]


def joined(segments: Segments, *, trim: bool) -> tuple[str, Placed]:
    """The text alone, and where in it its images stand.

    Args:
        segments: without a `Place`.
        trim: leave out the line ends between text and the images it opens or closes with: chat templates set their own.
    """
    text = ""
    placed: list[tuple[int, Image]] = []
    for segment in segments:
        if isinstance(segment, str):
            opens = trim and placed and not text
            text += segment.lstrip("\n") if opens else segment
        elif isinstance(segment, Image):
            placed.append((len(text), segment))
    closed = text.rstrip("\n")
    if trim and placed and placed[-1][0] == len(text) > len(closed):
        return closed, tuple((min(place, len(closed)), image) for place, image in placed)
    return text, tuple(placed)


def split(text: str, placed: Placed) -> list[str | Image]:
    """The reverse of `joined`: texts, none of them empty, and images in order."""
    found: list[str | Image] = []
    done = 0
    for place, image in placed:
        found += [text[done:place], image] if place > done else [image]
        done = place
    return [*found, text[done:]] if done < len(text) else found
