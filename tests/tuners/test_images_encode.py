"""Six families that see: tokens, labels and pixels as their processors make them from conversations and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing import FAMILIES, IMAGE_TOKENS, build, picture
from tuning import write

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.processor import load_processor
from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.collate import IGNORED, Collator
from ktmerge.tuners.data import Sample, read_data
from ktmerge.tuners.encode import Encoded, EncodedSet, Encoder, SampleError, encode_all
from ktmerge.tuners.images.agreement import require_alike
from ktmerge.tuners.images.opening import open_encoder
from ktmerge.tuners.preview import preview

Model = Callable[[str], Path]
SIZES = {"a.png": (40, 20), "b.png": (16, 16), "c.png": (9, 30)}
ROWS: list[tuple[list[str], list[str]]] = [
    (["a.png"], ["Is it good?", "yes yes"]),
    (["c.png"], ["Is this review good?", "no"]),
    (["a.png", "b.png"], ["Question", "seven", "What is one?", "eight"]),
]
"""Images of the first question; questions and answers in turn."""
SPOKEN = {
    "llava": (" ", "<|im_end|>"),
    "llava-onevision": ("\n", "<|im_end|>"),
    "qwen2.5-vl": ("", "<|im_end|>"),
    "smolvlm": (" ", "<end_of_utterance>"),
    "internvl": ("", "<|im_end|>"),
    "paligemma": ("", "<|im_end|>"),
}
"""What each family learns to say before and after an answer."""


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Builds a family's model once, with the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda family: build(family, folder / family, tiny_llama))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(tmp_path / name, size, seed)
    return tmp_path


def rows_of(family: str) -> list[tuple[list[str], list[str]]]:
    return ROWS[:2] if family == "paligemma" else ROWS


def samples_of(family: str, folder: Path) -> list[Sample]:
    rows = []
    for images, turns in rows_of(family):
        value = "<image>\n" * len(images) + turns[0]
        told = [{"from": ("human", "gpt")[n % 2], "value": turn if n else value} for n, turn in enumerate(turns)]
        rows.append({"image": images, "conversations": told})
    write(folder / "rows.jsonl", rows)
    return read_data(["rows.jsonl"], folder).samples


def encoded_by(base: Path, samples: list[Sample]) -> tuple[Encoder, list[Encoded]]:
    encoder, _ = open_encoder(Checkpoint.open(base), samples)
    return encoder, [encoder.encode(sample) for sample in samples]


def told_to(processor: Any, images: list[str], turns: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """One row by the processor alone."""
    from PIL import Image
    from transformers import ProcessorMixin

    opened = [Image.open(folder / name).convert("RGB") for name in images]
    if processor.chat_template is None:
        whole = processor.image_token * len(opened) + turns[0]
        return dict(processor(text=whole, images=opened, suffix=turns[1], return_tensors="pt"))
    parts = [{"type": "text", "text": turn} for turn in turns]
    first = [{"type": "image", "image": image} for image in opened]
    chat = [
        {"role": ("user", "assistant")[n % 2], "content": [*([] if n else first), part]} for n, part in enumerate(parts)
    ]
    given = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    # that of the family SmolVLM asks for the length of videos first
    return dict(ProcessorMixin.apply_chat_template(processor, chat, **given))


QUICK = ("llava", "qwen2.5-vl", "paligemma")  # a place for each image; sizes of its own; before the text
SOME = [pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow]) for family in FAMILIES]


@pytest.mark.every(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_labels_and_pixels_are_those_of_the_processor(family: str, model: Model, folder: Path) -> None:
    processor = load_processor(model(family))
    encoder, encoded = encoded_by(model(family), samples_of(family, folder))
    before, after = SPOKEN[family]
    token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS.get(family, "<image>"))
    for (images, turns), one in zip(rows_of(family), encoded, strict=True):
        own = told_to(processor, images, turns, folder)
        (batch,) = [Collator(0, extras=encoder.extras)([one])]
        assert batch["input_ids"].equal(own["input_ids"])
        assert own.keys() - {"labels"} == batch.keys() - {"labels"}
        for name in own.keys() - {"labels"}:
            assert batch[name].equal(own[name]), name
        if "labels" in own:  # the one processor that makes them
            assert batch["labels"].equal(own["labels"])
        trained = [i for i, label in zip(own["input_ids"][0], batch["labels"][0], strict=True) if label != IGNORED]
        spoken = "".join(f"{before}{answer}{after}" for answer in turns[1::2])
        assert processor.tokenizer.decode(trained) == spoken
        assert token not in batch["labels"]
        assert int((own["input_ids"] == token).sum()) > 0


@pytest.mark.every(3)
@pytest.mark.parametrize("family", SOME)
def test_batches_are_those_of_the_processor(family: str, model: Model, folder: Path) -> None:
    """Several rows at once, of pictures of several sizes."""
    from PIL import Image

    processor = load_processor(model(family))
    encoder, encoded = encoded_by(model(family), samples_of(family, folder))
    batch = Collator(processor.tokenizer.pad_token_id, extras=encoder.extras)(encoded)
    token = processor.image_token
    texts = [token * len(images) for images, _ in rows_of(family)]
    opened = [[Image.open(folder / name) for name in images] for images, _ in rows_of(family)]
    own = processor(text=texts, images=opened, return_tensors="pt", padding=True, padding_side="right")
    of_tokens = {"input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids"}
    assert own.keys() - of_tokens == batch.keys() - of_tokens
    for name in own.keys() - of_tokens:
        assert batch[name].equal(own[name]), name


@pytest.mark.every(3)
@pytest.mark.parametrize("family", SOME)
def test_text_rows_take_their_place_among_others(family: str, model: Model, folder: Path) -> None:
    """In one batch each row has the likelihood that it has alone."""
    from transformers import AutoModelForImageTextToText

    rows = [
        {"prompt": "Is it good?", "completion": " yes", "images": ["c.png"]},
        {"prompt": "One", "completion": " no"},
    ]
    write(folder / "rows.jsonl", [rows[1], *rows])
    encoder, encoded = encoded_by(model(family), read_data(["rows.jsonl"], folder).samples)
    network: Any = AutoModelForImageTextToText.from_pretrained(model(family)).eval()
    collate = Collator(0, extras=encoder.extras)
    with torch.no_grad():
        batch = network(**collate(encoded)).logits
        for row, one in enumerate(encoded):
            alone = network(**collate([one])).logits[0]
            torch.testing.assert_close(batch[row, : len(one)], alone, rtol=1e-4, atol=1e-5)


def test_over_long_rows_are_left_out_whole(model: Model, folder: Path) -> None:
    samples = samples_of("smolvlm", folder)
    encoder, encoded = encoded_by(model("smolvlm"), samples)
    longest = len(encoded[0])
    assert len(encoded[2]) > longest
    found = encode_all(encoder, samples, longest)
    assert found.dropped == sum(len(one) > longest for one in encoded)
    assert found.samples == [one for one in encoded if len(one) <= longest]


@pytest.mark.parametrize(
    ("family", "row", "sentence"),
    [
        ("llava", {"prompt": "<image> Is it?", "completion": " yes"}, "has a place for an image"),
        ("qwen2.5-vl", {"prompt": "<image> Is it?", "completion": " yes"}, "has a place for an image"),
        ("qwen2.5-vl", {"prompt": "Is <|image_pad|>?", "completion": " yes", "image": "b.png"}, "reads it 2"),
        ("llava", {"prompt": "Is it?", "completion": " <image>"}, "stands for an image"),
        ("paligemma", {"prompt": "Is it?", "completion": " <image>", "image": "b.png"}, "stands for an image"),
        (
            "paligemma",
            {"messages": [{"role": ("user", "assistant")[n % 2], "content": "yes"} for n in range(4)]},
            "reads one question and writes one answer",
        ),
    ],
)
def test_texts_that_take_themselves_for_images(
    model: Model, folder: Path, family: str, row: dict[str, Any], sentence: str
) -> None:
    write(folder / "rows.jsonl", [row])
    samples = read_data(["rows.jsonl"], folder).samples
    encoder, _ = open_encoder(Checkpoint.open(model(family)), samples)
    with pytest.raises(SampleError, match=sentence):
        encoder.encode(samples[0])


def test_templates_that_take_texts_have_the_token_in_them(model: Model, folder: Path) -> None:
    samples = samples_of("llava", folder)
    encoder, _ = open_encoder(Checkpoint.open(model("llava")), samples)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    processor = load_processor(model("llava"))
    processor.chat_template = template
    plain = type(encoder)(processor, encoder.stops, None, encoder._seen)  # type: ignore[attr-defined, call-arg, arg-type]
    text = processor.tokenizer.decode(list(plain.encode(samples[0]).ids))
    assert text == f"user: {'<image>' * 4}\nIs it good?<|im_end|>assistant: yes yes<|im_end|>"
    processor.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(UsageError, match="shows no images"):
        type(encoder)(processor, encoder.stops, None, encoder._seen)  # type: ignore[attr-defined, call-arg, arg-type]


def test_models_of_text_refuse_images(tiny_llama: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"rows.jsonl:1: has an image, but .* \(a 'llama' model\) takes text alone"):
        open_encoder(Checkpoint.open(tiny_llama), samples_of("llava", folder))


def test_preview_says_how_many_tokens_an_image_is(model: Model, folder: Path) -> None:
    samples_of("qwen2.5-vl", folder)
    (shown,) = preview(FinetuneJob(data=["rows.jsonl"]), model("qwen2.5-vl"), 1, folder)
    text = "".join(token for token, _ in shown.tokens)
    assert "<|vision_start|><|image_pad|>×10<|vision_end|>Is it good?" in text
    assert "".join(token for token, trained in shown.tokens if trained) == "yes yes<|im_end|>"
    assert shown.images == ("a.png (40 x 20)",)


def test_several_processes_want_images_in_all_rows_or_none(model: Model, folder: Path) -> None:
    _, encoded = encoded_by(model("llava"), samples_of("llava", folder))
    text = replace(encoded[0], images=())
    require_alike({"train": EncodedSet(encoded, 0), "upstream": EncodedSet([text], 0)})
    with pytest.raises(UsageError, match=r"3 of 4 samples \(train\) have images"):
        require_alike({"train": EncodedSet(encoded, 0), "replay": EncodedSet([text], 0)})
