from __future__ import annotations

import base64
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.recipes.images import Image, ImageError, check_images, images_of

PIL = pytest.importorskip("PIL.Image")
PIL_OPS = pytest.importorskip("PIL.ImageOps")


def png(colour: tuple[int, ...] = (200, 30, 60), size: tuple[int, int] = (20, 14), mode: str = "RGB") -> bytes:
    held = io.BytesIO()
    PIL.new(mode, size, colour).save(held, format="PNG")
    return held.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(png())
    return tmp_path


def sources(folder: Path) -> list[Any]:
    data, text = png(), base64.b64encode(png()).decode()
    return [
        "pictures/red.png", f"file://{folder}/pictures/red.png", str(folder / "pictures/red.png"),
        Path("pictures/red.png"), data, memoryview(data), text, "\n".join([text[:30], text[30:]]),
        f"data:image/png;base64,{text}", {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": "pictures/red.png"}, {"url": "pictures/red.png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}, PIL.open(io.BytesIO(data)),
        ["pictures/red.png"],
    ]  # fmt: skip


def test_every_source_gives_the_same_picture(folder: Path) -> None:
    wanted = PIL.open(io.BytesIO(png())).tobytes()
    for value in sources(folder):
        (image,) = images_of(value, folder)
        assert image.open().tobytes() == wanted, value
        image.check()


@pytest.mark.parametrize("nothing", [None, "", [], {"bytes": None, "path": None}, [None, ""]])
def test_nothing_is_no_image(folder: Path, nothing: Any) -> None:
    assert images_of(nothing, folder) == []


def test_several_images_keep_their_order(folder: Path) -> None:
    blue = png((0, 0, 250))
    found = images_of([blue, None, ["pictures/red.png"]], folder)
    assert [image.open().getpixel((0, 0)) for image in found] == [(0, 0, 250), (200, 30, 60)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (7, "not int"),
        ("https://example.org/a.png", "not fetched"),
        ("data:image/png,abc", "must hold base64"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("x" * 3000, "neither a path nor base64"),
        ({"pixels": 1}, "'bytes' or 'path'; here are pixels"),
    ],
)
def test_what_is_no_image_is_said(folder: Path, value: Any, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        images_of(value, folder)


def test_missing_and_broken_images_are_named_with_their_rows(folder: Path) -> None:
    held = io.BytesIO()
    PIL.effect_noise((64, 64), 90).save(held, format="JPEG")
    (folder / "cut.jpg").write_bytes(held.getvalue()[:800])
    (folder / "empty.png").write_bytes(b"")
    named = [
        (f"x.jsonl:{i}", images_of(value, folder))
        for i, value in enumerate(["pictures/red.png", "none.png", "cut.jpg", "empty.png", b"text", "pictures"], 1)
    ]
    found = check_images(named)
    assert [problem.split(":")[1] for problem in found] == ["2", "3", "4", "5", "6"]
    for problem, part in zip(found, ["none.png: no such image", "cut.jpg", "is empty", "an embedded image", "folder"],
                             strict=True):  # fmt: skip
        assert part in problem
        assert "BytesIO" not in problem


def test_pictures_stand_upright_and_have_three_colours() -> None:
    for mode, colour in (("L", 7), ("P", 3), ("RGBA", (1, 2, 3, 0)), ("1", 1), ("CMYK", (0, 9, 9, 0))):
        held = io.BytesIO()
        PIL.new(mode, (6, 4), colour).save(held, format="TIFF")
        assert Image(data=held.getvalue()).open().mode == "RGB"


@pytest.mark.parametrize("turn", range(10))
def test_a_picture_stands_as_its_exif_data_say_though_they_are_odd(turn: int) -> None:
    """Pillow turns it, too, but not where another tag has a type that it cannot write again, such as this width."""
    tags = [(0x0100, 1, 1, b"\1\0\0\0"), (0x0112, 3, 1, bytes([turn, 0, 0, 0]))]
    for entries in (tags[1:], tags):
        exif = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI4s", *tag) for tag in entries) + bytes(4)
        held = io.BytesIO()
        PIL.radial_gradient("L").crop((0, 0, 40, 24)).save(held, format="PNG", exif=b"Exif\0\0II*\0\x08\0\0\0" + exif)
        found = Image(data=held.getvalue()).open()
        if entries is not tags:
            wanted = PIL_OPS.exif_transpose(PIL.open(held)).convert("RGB")
        assert (found.size, found.tobytes()) == (wanted.size, wanted.tobytes())


def test_whatever_pillow_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(PIL, "open", failing)
    with pytest.raises(ImageError, match="not an image that can be read: unpack requires a buffer of 4 bytes"):
        Image(data=b"any").open()


def test_grey_of_sixteen_bits_keeps_its_shades() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for kind, mode in (("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")):
        held = io.BytesIO()
        raw = values.astype(">u2" if mode.endswith("B") else "<u2").tobytes()
        PIL.frombytes(mode, values.shape[::-1], raw).save(held, format=kind)
        image = Image(data=held.getvalue())
        image.check()
        assert np.asarray(image.open())[0].tolist() == [[shade] * 3 for shade in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_which_nothing_says_what_is_white_are_refused(kind: type) -> None:
    held = io.BytesIO()
    PIL.fromarray(np.ones((3, 3), dtype=kind)).save(held, format="TIFF")
    with pytest.raises(ImageError, match="save it with 8"):
        Image(data=held.getvalue()).check()
    held = io.BytesIO()
    exif = PIL.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    PIL.new("RGB", (30, 20)).save(held, format="JPEG", exif=exif)
    assert Image(data=held.getvalue()).open().size == (20, 30)
