"""Matching checkpoints across renames: complete, never by guess, and clear about what doesn't fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.tying import claimed_tie, tied_head
from ktmerge.errors import UsageError

Shapes = Mapping[str, Sequence[int]]
Make = Callable[..., Checkpoint]


@pytest.fixture
def make(make_checkpoint: Callable[..., Path]) -> Make:
    def made(
        name: str, shapes: Shapes, config: dict[str, Any] | None = None, dtype: Any = np.float32, *, alike: bool = False
    ) -> Checkpoint:
        """``alike``: the same numbers in all tensors; else each has its own."""
        tensors = {
            key: np.full(tuple(shape), 0 if alike else i, dtype) for i, (key, shape) in enumerate(shapes.items())
        }
        return Checkpoint.open(make_checkpoint(name, tensors, config=config or {"vocab_size": 9}))

    return made


LLAMA = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}


def renamed(shapes: Shapes, *rules: tuple[str, str]) -> dict[str, Sequence[int]]:
    """Every name with the first rule that applies: a prefix and what stands there instead."""

    def new(name: str) -> str:
        return next((put + name.removeprefix(prefix) for prefix, put in rules if name.startswith(prefix)), name)

    return {new(name): shape for name, shape in shapes.items()}


def test_equal_names(make: Make) -> None:
    base, other = make("base", LLAMA), make("other", dict(reversed(LLAMA.items())))
    alignment = align(base, other, "a")
    assert list(alignment.mapping) == list(base.tensors)
    assert alignment.renamed == {}
    alignment.require_complete()


LLAVA = {
    "language_model.model.embed_tokens.weight": (9, 4),
    "language_model.model.layers.0.mlp.up_proj.weight": (6, 4),
    "language_model.model.layers.1.mlp.up_proj.weight": (6, 4),
    "language_model.model.norm.weight": (4,),
    "language_model.lm_head.weight": (9, 4),
    "vision_tower.vision_model.embeddings.class_embedding": (4,),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight": (6, 4),
    "multi_modal_projector.linear_1.weight": (4, 4),
}
QWEN_VL = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
    "visual.blocks.0.norm1.weight": (4,),
    "visual.merger.mlp.0.weight": (4, 4),
}
CLIP = {
    "text_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "vision_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
    "logit_scale": (),
}
GPT2 = {"h.0.attn.c_attn.weight": (4, 12), "h.0.ln_1.weight": (4,), "wte.weight": (9, 4), "ln_f.weight": (4,)}
# name: (shapes, rules that turn one naming into the other)
RENAMES: dict[str, tuple[Shapes, list[tuple[str, str]]]] = {
    "llava saved again": (LLAVA, [("vision_tower.vision_model.", "vision_tower.")]),
    "llava saved in between": (
        LLAVA,
        [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("", "model."),
        ],
    ),
    "qwen2-vl in memory": (
        QWEN_VL,
        [("model.", "model.language_model."), ("visual.", "model.visual.")],
    ),
    "a wrapped state dict": (LLAMA, [("", "module.")]),
    "compiled": (LLAMA, [("", "_orig_mod.")]),
    "sharded, layer by layer": (
        LLAMA,
        [
            ("model.layers.", "model._fsdp_wrapped_module.layers."),
            ("", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
        ],
    ),
    "without the head's prefix": (LLAMA, [("model.", "")]),
    "gpt-2 as published and as saved": (GPT2, [("", "transformer.")]),
    "a prefix nobody knows": (CLIP, [("", "student.")]),
}


@pytest.mark.parametrize("case", RENAMES)
def test_renames_in_both_directions(make: Make, case: str) -> None:
    shapes, rules = RENAMES[case]
    old, new = make("old", shapes), make("new", renamed(shapes, *rules))
    expected = {name: next(iter(renamed({name: ()}, *rules))) for name in shapes}
    alignment = align(old, new, "a")
    assert alignment.mapping == expected
    assert alignment.renamed == {name: found for name, found in expected.items() if name != found}
    alignment.require_complete()
    back = align(new, old, "a")
    assert back.mapping == {found: name for name, found in expected.items()}
    back.require_complete()


def test_old_layer_norm_names(make: Make) -> None:
    base = make("base", {"bert.LayerNorm.weight": (4,), "bert.LayerNorm.bias": (4,)})
    other = make("other", {"bert.LayerNorm.gamma": (4,), "bert.LayerNorm.beta": (4,)})
    assert align(base, other, "a").mapping == {
        "bert.LayerNorm.weight": "bert.LayerNorm.gamma",
        "bert.LayerNorm.bias": "bert.LayerNorm.beta",
    }


def test_towers_are_never_confused(make: Make) -> None:
    base = make("base", CLIP)
    other = make("other", {"encoder.layers.0.mlp.fc1.weight": (6, 4), "logit_scale": ()})
    alignment = align(base, other, "a")
    assert alignment.mapping == {"logit_scale": "logit_scale"}
    with pytest.raises(UsageError, match="could be more than one of its tensors"):
        alignment.require_complete()


def test_two_candidates_are_ambiguous(make: Make) -> None:
    base = make("base", {"layers.0.w.weight": (4,)})
    other = make("other", {"model.layers.0.w.weight": (4,), "model.model.layers.0.w.weight": (4,)})
    alignment = align(base, other, "a")
    assert alignment.mapping == {}
    assert alignment.ambiguous == ("layers.0.w.weight",)


def test_missing_and_extra_are_listed(make: Make) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj.weight": (6, 4) for i in range(7)}
    base, other = make("base", {**LLAMA, **layers}), make("other", {**LLAMA, "value_head.weight": (1, 4)})
    alignment = align(base, other, "expert 'a'")
    assert len(alignment.missing) == 5
    assert alignment.extra == ("value_head.weight",)
    with pytest.raises(
        UsageError,
        match=r"expert 'a': lacks 5 of the base's tensors: model\.layers\.2\..* and 2 more; has 1 that the base "
        r"lacks: value_head\.weight\.",
    ):
        alignment.require_complete()


def test_shapes_are_compared(make: Make) -> None:
    changed = {**LLAMA, "model.layers.1.mlp.up_proj.weight": (4, 6)}
    alignment = align(make("base", LLAMA), make("other", changed), "a")
    assert "model.layers.1.mlp.up_proj.weight" not in alignment.mapping
    assert [m.name for m in alignment.mismatched] == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        UsageError, match=r"a: differs from the base in 1 of its tensors: .*F32 \[6, 4\] in the base, F32 \[4, 6\] here"
    ):
        alignment.require_complete()


def test_integers_do_not_answer_to_floats(make: Make) -> None:
    with pytest.raises(
        UsageError, match=r"differs from the base in 5 of its tensors.*I8.*It must be a fine-tune of this very base"
    ):
        align(make("base", LLAMA), make("other", LLAMA, dtype=np.int8), "a").require_complete()
    align(make("base2", LLAMA), make("other2", LLAMA, dtype=np.float16), "a").require_complete()


def test_a_grown_vocabulary_is_called_that(make: Make) -> None:
    grown = {**LLAMA, "model.embed_tokens.weight": (11, 4), "lm_head.weight": (11, 4)}
    with pytest.raises(UsageError, match="a: its vocabulary has 11 rows, the base's 9"):
        align(make("base", LLAMA), make("other", grown), "a").require_complete()


def test_buffers_may_come_and_go(make: Make) -> None:
    with_buffer = {**LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    plain, buffered = make("plain", LLAMA), make("buffered", with_buffer)
    align(plain, buffered, "a").require_complete()
    align(buffered, plain, "a").require_complete()
    other = make("other", {**with_buffer, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    align(buffered, other, "a").require_complete()


# --- tied heads -------------------------------------------------------------------------------------------------------

TIED = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
TIES = {"vocab_size": 9, "tie_word_embeddings": True}
UNTIED = {"vocab_size": 9, "tie_word_embeddings": False}


@pytest.mark.parametrize("config", [TIES, {"vocab_size": 9}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_head_that_the_base_ties_is_held_against_the_embedding(make: Make, config: dict[str, Any]) -> None:
    base, other = make("base", TIED, config), make("other", LLAMA, config)
    alignment = align(base, other, "expert 'a'")
    alignment.require_complete()
    assert alignment.tied_extra == {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(UsageError, match=r"expert 'a': its 'lm_head\.weight' differs from its 'model\.embed_tokens"):
        alignment.require_tied(other)

    equal = {name: np.zeros(shape, np.float32) for name, shape in LLAMA.items()}
    save_file(equal, other.root / "model.safetensors")
    again = Checkpoint.open(other.root)
    align(base, again, "expert 'a'").require_tied(again)


def test_a_head_that_nothing_ties_is_extra(make: Make) -> None:
    alignment = align(make("base", TIED, UNTIED), make("other", LLAMA, UNTIED), "a")
    assert alignment.extra == ("lm_head.weight",)


def test_a_base_that_stores_its_head_takes_it_from_a_tied_other(make: Make) -> None:
    base, other = make("base", LLAMA, TIES, alike=True), make("other", TIED, TIES)
    alignment = align(base, other, "a")
    alignment.require_complete()
    assert alignment.mapping["lm_head.weight"] == "model.embed_tokens.weight"
    assert align(base, make("untied", TIED, UNTIED), "a").missing == ("lm_head.weight",)
    only_says_so = make("says so", LLAMA, TIES)
    assert tied_head(only_says_so) is None
    assert claimed_tie(only_says_so) is not None
    assert align(only_says_so, other, "a").missing == ("lm_head.weight",)


def test_of_two_tied_tensors_a_file_may_keep_the_name_of_either(make: Make) -> None:
    by_head = {name: shape for name, shape in LLAMA.items() if "embed_tokens" not in name}
    one, other = make("one", TIED, TIES), make("other", by_head, TIES)
    for base, expert, name, found in (
        (one, other, "model.embed_tokens.weight", "lm_head.weight"),
        (other, one, "lm_head.weight", "model.embed_tokens.weight"),
    ):
        alignment = align(base, expert, "a")
        alignment.require_complete()
        assert alignment.mapping[name] == found
    assert align(make("untied", TIED, UNTIED), other, "a").missing == ("model.embed_tokens.weight",)
    places = {"bert.embeddings.position_embeddings.weight": (5, 4)}  # not another table of tokens
    bert = make("bert", {"bert.embeddings.word_embeddings.weight": (9, 4), **places}, TIES)
    align(bert, make("by head", {"cls.lm_head.weight": (9, 4), **places}, TIES), "a").require_complete()


def test_a_head_may_have_another_name(make: Make) -> None:
    old = renamed(LLAMA, ("lm_head.", "embed_out."))
    alignment = align(make("base", old, UNTIED), make("other", LLAMA, UNTIED), "a")
    alignment.require_complete()
    assert alignment.mapping["embed_out.weight"] == "lm_head.weight"


def test_a_model_without_any_head_ties_nothing(make: Make) -> None:
    headless = make("headless", TIED, {"vocab_size": 9, "architectures": ["LlamaModel"]})
    assert align(make("base", LLAMA), headless, "a").missing == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("shapes", "config", "found"),
    [
        (LLAMA, TIES, ("lm_head.weight", "model.embed_tokens.weight")),
        (LLAVA, {"text_config": TIES}, ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")),
        (LLAMA, UNTIED, None),
        (LLAMA, {"vocab_size": 9}, None),
        (TIED, TIES, None),
        ({**LLAMA, "lm_head.weight": (8, 4)}, TIES, None),
    ],
)
def test_tied_head(make: Make, shapes: Shapes, config: dict[str, Any], found: tuple[str, str] | None) -> None:
    assert tied_head(make("base", shapes, config, alike=True)) == found


def test_a_tied_head_under_another_prefix(make: Make) -> None:
    names = renamed(LLAVA, ("language_model.model.", "model.language_model."), ("language_model.", ""), ("", "model."))
    tied = {name: shape for name, shape in LLAVA.items() if "lm_head" not in name}
    config = {"text_config": {"vocab_size": 9}}
    alignment = align(make("base", tied, config), make("other", names, config), "a")
    alignment.require_complete()
    assert alignment.tied_extra == {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def test_weight_norm_under_its_old_and_new_names(make: Make) -> None:
    conv = "encoder.pos_conv_embed.conv."
    old = {f"{conv}weight_g": (1, 1, 3), f"{conv}weight_v": (4, 2, 3)}
    new = {f"{conv}parametrizations.weight.original{number}": shape for number, shape in enumerate(old.values())}
    for number, (first, second) in enumerate(((old, new), (new, old))):
        alignment = align(make(f"base{number}", first), make(f"other{number}", second), "a")
        assert alignment.mapping == dict(zip(first, second, strict=True))


def test_whispers_head_is_a_head(make: Make) -> None:
    table = {"model.decoder.embed_tokens.weight": (9, 4)}
    other = make("other", {**table, "proj_out.weight": (9, 4)}, alike=True)
    alignment = align(make("base", table, alike=True), other, "a")
    alignment.require_complete()
    assert alignment.tied_extra == {"proj_out.weight": "model.decoder.embed_tokens.weight"}
    alignment.require_tied(other)
