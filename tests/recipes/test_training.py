"""What is trained, as people write it: which tensors of which model an expression names."""

from __future__ import annotations

import pytest

from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.training import TrainExpression

LLAVA = [
    "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
    *(f"model.vision_tower.vision_model.encoder.layers.{n}.mlp.fc1.weight" for n in range(3)),
    "model.multi_modal_projector.linear_1.weight",
    "model.language_model.embed_tokens.weight",
    *(f"model.language_model.layers.{n}.self_attn.q_proj.weight" for n in range(4)),
    "model.language_model.norm.weight",
    "lm_head.weight",
]
CONFIG = {"model_type": "llava", "text_config": {"vocab_size": 8}, "vision_config": {}}


def chosen(text: str) -> list[str]:
    wanted = TrainExpression.parse(text).matcher(Parts(LLAVA, CONFIG))
    return [name.removeprefix("model.").removesuffix(".weight") for name in LLAVA if wanted(name)]


def layers(*numbers: int) -> list[str]:
    return [f"language_model.layers.{n}.self_attn.q_proj" for n in numbers]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("top:1", layers(0)),
        ("last:2", layers(2, 3)),
        ("last:4", layers(0, 1, 2, 3)),
        ("connector", ["multi_modal_projector.linear_1"]),
        ("head", ["lm_head"]),
        ("embed", ["language_model.embed_tokens"]),
        ("vision.layers[-1]", ["vision_tower.vision_model.encoder.layers.2.mlp.fc1"]),
        ("last:1+head+connector", ["multi_modal_projector.linear_1", *layers(3), "lm_head"]),
        ("top:1 + llm.layers[2], norm", [*layers(0, 2), "language_model.norm"]),
        (
            "llm",
            ["language_model.embed_tokens", *layers(0, 1, 2, 3), "language_model.norm", "lm_head"],
        ),
    ],
)
def test_an_expression_names_what_it_says(text: str, names: list[str]) -> None:
    assert chosen(text) == names


def test_full_is_everything_and_vision_its_tower() -> None:
    assert len(chosen("full")) == len(chosen("vision+full")) == len(LLAVA)
    assert all(name.startswith("vision_tower") for name in chosen("vision"))
    assert len(chosen("vision")) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("last:5", r"train 'last:5': the model has 4 layers \(llm.layers\[0:4\]\)"),
        ("top:0", "has 4 layers"),
        ("audio", "part 'audio' matches no tensor of this model; it has llm, llm.layers, vision"),
        ("llm.layers[9]", "matches no tensor"),
    ],
)
def test_what_a_model_lacks_is_refused_with_what_it_has(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        chosen(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a term is empty"),
        ("head+", "a term is empty"),
        ("top", "write top:K with a number of layers"),
        ("last:x", "write last:K with a number of layers"),
        ("conector", "Did you mean 'connector'"),
        ("llm.layers[a]", "can't read the layers"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_recipe(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        FinetuneJob.model_validate({"data": "a.jsonl", "train": text})


def test_a_list_is_a_sum_and_rates_are_read_with_the_recipe() -> None:
    assert FinetuneJob.model_validate({"data": "a.jsonl", "train": ["last:4", "head"]}).train == "last:4+head"
    with pytest.raises(UsageError, match=r"learning_rates 'had': can't read 'had'\. Did you mean 'head'"):
        FinetuneJob.model_validate({"data": "a.jsonl", "learning_rates": {"had": 1e-5}})
