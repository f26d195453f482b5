"""Rows with images: every way to name them, where they stand in the text, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from seeing import picture
from tuning import write

from ktmerge.errors import UsageError
from ktmerge.recipes.images import Image
from ktmerge.tuners.data import ChatSample, PlainSample, Sample, read_data
from ktmerge.tuners.images.check import look_at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "pictures/a.png", (6, 4), seed=1)
    picture(tmp_path / "pictures/b.png", (3, 5), seed=2)
    return tmp_path


def read(folder: Path, *rows: dict[str, Any]) -> list[Sample]:
    write(folder / "rows.jsonl", list(rows))
    return read_data(["rows.jsonl"], folder, image_root=folder / "pictures").samples


def asked(*content: Any, answer: Any = "yes", **columns: Any) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": content[0] if len(content) == 1 else list(content)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, **columns}


def laid_out(sample: Sample) -> list[tuple[str, list[tuple[int, str]]]]:
    """Text of each turn, and where in it which file stands."""
    if isinstance(sample, PlainSample):
        return [(sample.prompt, [(place, file(image)) for place, image in sample.placed])]
    return [(one.content, [(place, file(image)) for place, image in one.images]) for one in sample.messages]


def file(image: Image) -> str:
    return image.path.name if image.path is not None else "data"


TEXT = {"type": "text", "text": "Is it?"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": None, "path": "a.png", "text": None},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ],
    ids=str,
)
def test_parts_of_messages_name_files(folder: Path, part: dict[str, Any]) -> None:
    (sample,) = read(folder, asked(part, TEXT))
    assert laid_out(sample) == [("Is it?", [(0, "a.png")]), ("yes", [])]
    assert [image.path for image in sample.images] == [folder / "pictures/a.png"]


def test_parts_of_messages_hold_base64(folder: Path) -> None:
    raw = (folder / "pictures/a.png").read_bytes()
    coded = base64.b64encode(raw).decode()
    parts = [
        {"type": "image", "base64": coded},
        {"type": "image", "bytes": coded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": coded}},
    ]
    for sample in read(folder, *(asked(part, TEXT) for part in parts)):
        assert [image.data for image in sample.images] == [raw]


def test_llava_json_has_images_at_their_marks(folder: Path) -> None:
    def row(value: str, image: Any) -> dict[str, Any]:
        return {
            "id": "1",
            "image": image,
            "conversations": [
                {"from": "human", "value": value},
                {"from": "gpt", "value": "yes"},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "no"},
            ],
        }

    rows = [
        row("<image>\nIs it?", "a.png"),
        row("Is it?\n<image>", "a.png"),
        row("Is <image> as <image>?", ["a.png", "b.png"]),
        row("Is it?", ["a.png", "b.png"]),
        row("Is it?", None),
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    found = read_data(["rows.json"], folder, image_root=folder / "pictures").samples
    first = [laid_out(sample)[0] for sample in found]
    assert first == [
        ("Is it?", [(0, "a.png")]),
        ("Is it?", [(6, "a.png")]),
        ("Is  as ?", [(3, "a.png"), (7, "b.png")]),
        ("Is it?", [(0, "a.png"), (0, "b.png")]),
        ("Is it?", []),
    ]
    assert laid_out(found[2])[2] == ("Sure?", [])


def test_parts_without_content_take_the_images_of_the_row(folder: Path) -> None:
    bare = {"type": "image"}
    row = asked(
        {"type": "text", "text": "Is "}, bare, {"type": "text", "text": " as "}, bare, images=["b.png", "a.png"]
    )
    (sample,) = read(folder, row)
    assert laid_out(sample)[0] == ("Is  as ", [(3, "b.png"), (7, "a.png")])


def test_prompts_keep_their_text(folder: Path) -> None:
    rows = [
        {"prompt": "<image>\nIs it?", "completion": " yes", "images": ["a.png"]},
        {"prompt": "Is it?", "completion": " yes", "image": "a.png"},
        {"prompt": "What does <image> mean in HTML?", "completion": " nothing"},
    ]
    found = read(folder, *rows)
    assert laid_out(found[0]) == [("\nIs it?", [(0, "a.png")])]
    assert laid_out(found[1]) == [("Is it?", [(0, "a.png")])]
    assert laid_out(found[2]) == [("What does <image> mean in HTML?", [])]


def test_parquet_with_embedded_images(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    raw = (folder / "pictures/a.png").read_bytes()
    image = {"bytes": raw, "path": "elsewhere.png"}
    text = {"type": "text", "text": "Is it?"}
    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    plain = [{"role": "user", "content": [text]}, turns[1]]
    table = pyarrow.Table.from_pylist([{"images": [image], "messages": turns}, {"images": [], "messages": plain}])
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    first, second = read_data(["rows.parquet"], folder).samples
    assert laid_out(first) == [("Is it?", [(0, "data")]), ("yes", [])]
    assert [one.data for one in first.images] == [raw]
    assert second.images == ()


@pytest.mark.slow
def test_datasets_own_image_column(folder: Path) -> None:
    """As the library that most people use writes it."""
    import datasets

    rows = {"image": [str(folder / "pictures/a.png")], "prompt": ["Is it?"], "completion": [" yes"]}
    written = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    written.map(lambda row: row, features=written.features).to_parquet(folder / "rows.parquet")
    (sample,) = read_data(["rows.parquet"], folder).samples
    assert [image.open().size for image in sample.images] == [(6, 4)]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            asked("<image> and <image>", images=["a.png"]),
            r"rows.jsonl:1: names 1 images, but .* places \(<image>\) for 2",
        ),
        (asked({"type": "image"}, TEXT), "has 1 parts of type image, but names no image"),
        (asked("Is it?", answer=[{"type": "image", "image": "a.png"}]), "the assistant turn 2 has an image"),
        (asked("Is it?", answer="<image> yes", image="a.png"), "the assistant turn 2 has an image"),
        (asked({"type": "video", "video": "a.mp4"}, TEXT), "not text or an image, but video"),
        (asked("Is it?", image="https://example.org/a.png"), "not fetched; download them"),
        (asked("Is it?", image=7), "an image is a path, bytes or base64"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_by_row(folder: Path, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read(folder, row)


def test_missing_and_broken_images_are_told_together(folder: Path) -> None:
    raw = (folder / "pictures/a.png").read_bytes()
    (folder / "pictures/cut.png").write_bytes(raw[: len(raw) // 2])
    (folder / "pictures/text.png").write_text("no image")
    names = ["a.png", "cut.png", "none.png", "text.png", *(f"{n}.png" for n in range(109))]
    samples = read(folder, *(asked("Is it?", image=name) for name in names))
    with pytest.raises(UsageError) as told:
        look_at(samples)
    lines = str(told.value).splitlines()
    assert lines[0] == "112 of 113 images cannot be used."
    assert [line.split(": ")[0] for line in lines[1:101]] == [f"rows.jsonl:{n}" for n in range(2, 102)]
    assert "cut.png" in lines[1]
    assert "none.png: no such image" in lines[2]
    assert lines[101] == "... and 12 more problems in the data."


def test_every_image_is_read_once(folder: Path) -> None:
    rows = [asked("Is it?", images=names) for names in (["a.png"], ["a.png", "b.png"], [])]
    samples = read(folder, *rows)
    seen = look_at(samples)
    assert sorted(seen.sizes.values()) == [(3, 5), (6, 4)]
    assert seen.digest(samples) != seen.digest(samples[:1])
    assert seen.digest(samples) == look_at(samples).digest(read(folder, *rows))
    (folder / "pictures/b.png").write_bytes((folder / "pictures/a.png").read_bytes())
    assert look_at(samples).digest(samples) != seen.digest(samples)


def test_images_lie_beside_their_data(folder: Path) -> None:
    write(folder / "pictures/rows.jsonl", [asked("Is it?", image="a.png")])
    (sample,) = read_data(["pictures/rows.jsonl"], folder).samples
    assert isinstance(sample, ChatSample)
    assert look_at([sample]).sizes[sample.images[0]] == (6, 4)
