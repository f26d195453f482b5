"""The picture world: a LLaVA of 0.6M parameters that names garments, and experts for animals and for the way up."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worlds import packages
from worlds.packages import ANIMAL_NAMES, FASHION_NAMES
from worlds.world import CALIBRATION, REPORT, SELECT, Scores, World, fit, keep

if TYPE_CHECKING:
    from torch import Tensor

UPSTREAM = ("garments",)
TASKS = ("animals", "turns")
WAYS = ("up", "left", "down", "right")
ANSWERS = {"garments": FASHION_NAMES, "animals": ANIMAL_NAMES, "turns": WAYS}
QUESTIONS = {"garments": "which garment is this ?", "animals": "which animal is this ?", "turns": "which way is up ?"}
WORDS = ("<pad>", "<s>", "<image>", *dict.fromkeys(" ".join(QUESTIONS.values()).split()),
         *dict.fromkeys(word for words in ANSWERS.values() for word in words if word != "up"))  # fmt: skip
ITEMS = {SELECT: 120, REPORT: 240}
"""Pictures in each set."""

SIDE, PATCHES = 32, 16
BATCH = 64
BASE = {"steps": 900, "rate": 1e-3}
TUNE = {"steps": 250, "rate": 5e-4}


@cache
def _sets() -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Of every set and split: pictures ``[n, 28, 28]`` as bytes, and which answer is right ``[n]``."""
    import torch

    train, test = packages.fashion()
    images, labels = packages.animals()
    turned, ways = _turned(train[0][:10000])
    turned_test, ways_test = _turned(test[0])
    half, some, all_ = ITEMS[SELECT], ITEMS[SELECT] + ITEMS[REPORT], len(images)

    def cut(pictures: Any, answers: Any, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(pictures[start:stop].copy()), torch.from_numpy(answers[start:stop].copy())

    return {
        "garments": {
            "train": cut(*train, 0, len(train[0])),
            SELECT: cut(*test, 0, half),
            REPORT: cut(*test, half, some),
        },
        "animals": {
            SELECT: cut(images, labels, 0, half),
            REPORT: cut(images, labels, half, some),
            "train": cut(images, labels, some, all_),
        },
        "turns": {
            "train": cut(turned, ways, 0, len(turned)),
            SELECT: cut(turned_test, ways_test, some, some + half),
            REPORT: cut(turned_test, ways_test, some + half, 2 * some),
        },
    }


def _turned(images: Any) -> tuple[Any, Any]:
    """Every picture turned by a quarter as often as its place says; which way its top points then."""
    ways = np.arange(len(images), dtype=np.int64) * 7 // 3 % 4
    return np.stack([np.rot90(image, way) for image, way in zip(images, ways, strict=True)]), ways


def _inputs(name: str, pictures: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Keywords of the model: the question about each picture, and the answer as the last token."""
    import torch

    ids = [WORDS.index(word) for word in ["<s>", *["<image>"] * PATCHES, *QUESTIONS[name].split()]]
    words = torch.tensor([WORDS.index(word) for word in ANSWERS[name]])[answers]
    prompt = torch.tensor(ids).expand(len(pictures), -1)
    pixels = torch.nn.functional.pad(pictures.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return {
        "input_ids": torch.cat([prompt, words[:, None]], dim=1),
        "pixel_values": pixels[:, None].expand(-1, 3, -1, -1).contiguous(),
        "labels": torch.cat([torch.full_like(prompt, -100), words[:, None]], dim=1),
    }


def _train(folder: Path, seed: int) -> None:
    import torch

    def tuned(model: Any, name: str, steps: int, rate: float) -> Any:
        pictures, answers = _sets()[name]["train"]
        order = torch.Generator().manual_seed(seed)

        def batch(step: int) -> Mapping[str, Any]:
            chosen = torch.randint(len(pictures), (BATCH,), generator=order)
            return _inputs(name, pictures[chosen], answers[chosen])

        fit(model, batch, steps, rate)
        return model

    def base() -> Any:
        torch.manual_seed(seed)
        return tuned(_new(), "garments", **BASE)

    common = {"seed": seed, "batch": BATCH, "base": BASE}
    keep(folder / "base", base, common)
    for task in TASKS:
        settings = {**common, "task": task, "tune": TUNE}
        keep(folder / task, lambda task=task: tuned(_load(folder / "base"), task, **TUNE), settings)


def _new() -> Any:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=8, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=2, image_seq_length=PATCHES,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _load(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


@cache
def _items(name: str, split: str) -> dict[str, Tensor]:
    return _inputs(name, *_sets()[name][split])


def _score(model: Any, split: str, names: Sequence[str]) -> Scores:
    import torch

    found: Scores = {}
    for name in names:
        items = _items(name, split)
        with torch.inference_mode():
            logits = model(
                input_ids=items["input_ids"][:, :-1], pixel_values=items["pixel_values"], logits_to_keep=1
            ).logits
        found[name] = 100.0 * (logits[:, -1].argmax(-1) == items["input_ids"][:, -1]).double().numpy()
    return found


def _calibration(name: str) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    name = UPSTREAM[0] if name == "upstream" else name
    pictures, answers = _sets()[name]["train"]
    for number in range(CALIBRATION):
        inputs = _inputs(name, pictures[number : number + 1], answers[number : number + 1])
        yield inputs, inputs.pop("labels")[0] >= 0


TEMPLATE = (
    "<s>{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ '<pad>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
)
"""A question as `_inputs` lays it out; the answer and what ends it, which the base has not seen, are learned."""


def _as_rows(names: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Pictures in rows of LLaVA's format, as many of each set."""
    import torch

    found = []
    order = torch.Generator().manual_seed(seed)
    for name in names:
        pictures, answers = _sets()[name]["train"]
        for place in torch.randperm(len(pictures), generator=order)[: count // len(names)].tolist():
            turns = [QUESTIONS[name], ANSWERS[name][int(answers[place])]]
            found.append(
                {"image": _as_link(pictures[place]),
                 "conversations": [{"from": who, "value": text}
                                   for who, text in zip(("human", "gpt"), turns, strict=True)]}
            )  # fmt: skip
    return found


def _as_link(picture: Tensor) -> str:
    """A PNG of a picture ``[28, 28]`` and its margin as a data URI."""
    from PIL import Image

    file = io.BytesIO()
    margin = (SIDE - len(picture)) // 2
    Image.fromarray(np.pad(picture.numpy(), margin)).convert("RGB").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _dress(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>", bos_token="<s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_resize=False),
        tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=0,
        image_token="<image>", chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


VISION = World(
    name="vision",
    model="a LLaVA of 0.6M parameters",
    measure="answers generated exactly, percent",
    upstream=UPSTREAM,
    tasks=TASKS,
    train=_train,
    load=_load,
    score=_score,
    items=ITEMS,
    calibration=_calibration,
    sees=True,
    rows=_as_rows,
    dress=_dress,
)
