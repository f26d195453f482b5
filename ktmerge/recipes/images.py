"""Images of rows: named by path, embedded as bytes, written in base64, or rows of a Hugging Face Image column."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.regular import read_regular
from ktmerge.errors import UsageError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MARK = "<image>"
"""What stands for an image in the texts of rows and prompts, whatever token a model has for it."""
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0A")
"""How base64 of JPEG, PNG, GIF, WebP, BMP and TIFF begins."""

_WITHOUT_WHITE = ("I", "F")
"""Pillow's modes of one number a pixel, whole or not, that may be anything."""
_ORIENTATION = 0x0112
"""The EXIF tag that says how a picture lies."""
_TURNS: Mapping[Any, str] = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


class ImageError(Exception):
    """What is wrong with one image, without saying which row it belongs to."""


@dataclass(frozen=True)
class Image:
    """One image of a row, not read yet.

    Attributes:
        path: the file it lies in, or None.
        data: the bytes of such a file, if the row itself holds them.
    """

    path: Path | None = None
    data: bytes | None = None

    def content(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: there is no such file, or it cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return read_regular(self.path)
        except FileNotFoundError:
            raise ImageError(f"{self.path}: no such image.") from None
        except IsADirectoryError:
            raise ImageError(f"{self.path}: is a folder, not an image.") from None
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be read: {error.strerror or error}.") from None
        except ValueError:  # half a character
            raise ImageError(f"{str(self.path)!r} names no file.") from None

    def digest(self) -> str:
        """sha256 of the image file's bytes."""
        return hashlib.sha256(self.content()).hexdigest()

    def open(self) -> Picture:
        """The picture, RGB and upright as its EXIF data say, as datasets and processors decode it.

        Grey of 16 bits is scaled to 8, which they cut at 255, so that nearly all of it would be white.

        Raises:
            ImageError: it is missing, or not an image that Pillow reads whole.
        """
        content = self.content()
        with self._reading(content):
            picture = self._decoded(content)
            return _in_eight_bits(_upright(picture) if _turned(content) else picture).convert("RGB")

    def check(self) -> None:
        """Read it whole, as cheaply as its format allows.

        Raises:
            ImageError: as ``open``.
        """
        content = self.content()
        with self._reading(content):
            self._decoded(content, small=True)

    def _decoded(self, content: bytes, small: bool = False) -> Picture:
        picture: Picture = _pillow().open(io.BytesIO(content))
        if small:
            picture.draft("RGB", (1, 1))  # of JPEG an eighth of the pixels
        picture.load()
        if picture.mode in _WITHOUT_WHITE:
            raise ImageError(f"{self._name}: has 32 bits a pixel, of which nothing says what is white; save it with 8.")
        return picture

    @contextmanager
    def _reading(self, content: bytes) -> Iterator[None]:
        """Answer what Pillow raises at broken files, which is of every type, with a sentence."""
        _pillow()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata
                yield
        except ImageError:
            raise
        except Exception as error:
            what = "is empty" if not content else f"not an image that can be read: {_without_object(first_line(error))}"
            raise ImageError(f"{self._name}: {what.rstrip('.')}.") from None

    @property
    def _name(self) -> str:
        return str(self.path) if self.path is not None else "an embedded image"


def images_of(value: Any, folder: Path) -> list[Image]:
    """The images that a row's value stands for; none for null or an empty text or list.

    Args:
        value: a path, a ``data:`` or ``file:`` address, base64, bytes, ``{"bytes": ..., "path": ...}`` as Hugging Face
            datasets keep images, ``{"url": ...}`` or ``{"image_url": ...}`` as chat messages do, a Pillow image, or a
            list of such.
        folder: where relative paths start.

    Raises:
        ImageError: it is none of these, or an address on the network. Whether files are there is not looked at.
    """
    if value is None or (isinstance(value, str | list | tuple) and not value):
        return []
    if isinstance(value, list | tuple):
        return [image for one in value for image in images_of(one, folder)]
    if isinstance(value, bytes | bytearray | memoryview):
        return [Image(data=bytes(value))]
    if isinstance(value, str):
        return [_from_text(value, folder)]
    if isinstance(value, Path):
        return [Image(folder / value)]
    if isinstance(value, Mapping):
        return _from_mapping(value, folder)
    if hasattr(value, "save") and hasattr(value, "convert"):
        return [_from_picture(value)]
    raise ImageError(f"an image is a path, bytes or base64, not {type(value).__name__}.")


def check_images(named: Iterable[tuple[str, Iterable[Image]]]) -> list[str]:
    """A sentence for each image that is missing or broken.

    Args:
        named: where a row is, and its images; an image is read once, however many rows show it.
    """
    problems: list[str] = []
    known: dict[Path, str] = {}
    for where, images in named:
        for image in images:
            wrong = known.get(image.path) if image.path is not None else None
            if wrong is None:
                wrong = _wrong(image)
                if image.path is not None:
                    known[image.path] = wrong
            if wrong:
                problems.append(f"{where}: {wrong}")
    return problems


def require_pillow() -> None:
    """Fail early if images cannot be read at all.

    Raises:
        UsageError: Pillow is not installed.
    """
    _pillow()


def _in_eight_bits(picture: Picture) -> Picture:
    if not picture.mode.startswith("I;16"):
        return picture
    return picture.convert("I").point(lambda value: value / 256).convert("L")


def _upright(picture: Picture) -> Picture:
    """As `PIL.ImageOps.exif_transpose`, which fails at some EXIF blocks that it cannot write again."""
    turn = _TURNS.get(picture.getexif().get(_ORIENTATION))
    return picture if turn is None else picture.transpose(_pillow().Transpose[turn])


def _wrong(image: Image) -> str:
    try:
        image.check()
    except ImageError as error:
        return str(error)
    return ""


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError:
        raise UsageError("images need the package Pillow; pip install 'ktmerge[vision]'.") from None
    return PIL.Image


def _from_text(text: str, folder: Path) -> Image:
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ImageError("a data: address must hold base64.")
        return Image(data=_decode(body))
    if text.startswith(("http://", "https://", "s3://", "gs://")):
        raise ImageError(f"{_shortened(text)}: images on the network are not fetched; download them and name the file.")
    if text.startswith(_BASE64_STARTS) and len(text) > 64:
        return Image(data=_decode(text))
    if len(text) > 1024 or "\n" in text or "\0" in text:
        raise ImageError(f"{_shortened(text)!r} is neither a path nor base64 of an image.")
    return Image(folder / text.removeprefix("file://"))


def _from_mapping(value: Mapping[str, Any], folder: Path) -> list[Image]:
    data = value.get("bytes")
    if isinstance(data, str):
        return [Image(data=_decode(data))]
    if data is not None:
        return images_of(data, folder)
    for key in ("path", "image", "image_url", "url"):
        if value.get(key) is not None:
            return images_of(value[key], folder)
    if value.keys() & {"bytes", "path"}:
        return []  # null in a column of images
    raise ImageError(f"an image given by keys has 'bytes' or 'path'; here are {', '.join(map(str, value)) or 'none'}.")


def _from_picture(picture: Any) -> Image:
    held = io.BytesIO()
    picture.convert("RGB").save(held, format="PNG")
    return Image(data=held.getvalue())


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{_shortened(text)!r} is not valid base64.") from None


def _turned(content: bytes) -> bool:
    """Whether the file may say that it lies on its side; only then is its EXIF block worth parsing."""
    return b"Exif" in content[:65536] or b"eXIf" in content[:65536]


def _without_object(message: str) -> str:
    """Pillow's message without the address of the buffer it read from."""
    return "unknown format" if "cannot identify image file" in message else message


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
