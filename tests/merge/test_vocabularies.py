"""Blends of models whose vocabularies differ. The oracle works on dictionaries from token to row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import llama_tensors, read, same_bytes, tuned, write

from ktmerge.errors import UsageError
from ktmerge.merge import blend
from ktmerge.merge.planning import plan_blend

EMBEDDING = "model.embed_tokens.weight"
CONFIG = {"model_type": "llama", "tie_word_embeddings": True}
WHOLE = {"method": "linear", "lambda": 1}
BASE = [f"t{number}" for number in range(40)]  # of 48 rows: 8 are padding


def tokenizer(tokens: list[str], added: int = 0) -> str:
    """A tokenizer.json whose last ``added`` tokens are added ones."""
    count = len(tokens) - added
    special = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": n, "content": tokens[n], **special} for n in range(count, len(tokens))],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {
                "type": "WordLevel",
                "vocab": {token: number for number, token in enumerate(tokens[:count])},
                "unk_token": "t0",
            },
        }
    )


def model(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    tokens: list[str] | None,
    added: int = 0,
    rows: Any = None,
    **config: Any,
) -> dict[str, torch.Tensor]:
    if rows is not None:
        tensors = {**tensors, EMBEDDING: rows}
    files = {} if tokens is None else {"tokenizer.json": tokenizer(tokens, added)}
    write(folder, tensors, {**CONFIG, "vocab_size": len(tensors[EMBEDDING]), **config}, files=files)
    return tensors


def table(rows: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, torch.Tensor]:
    return model(tmp_path / "base", llama_tensors(), BASE)


@pytest.mark.every(5)
@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        ([*BASE, "<new>", "<newer>"], 42),
        ([*BASE, "<new>"], 48),
        ([*BASE], 64),
        ([*BASE], 40),
        (["<first>", *BASE], 48),
        ([*BASE[::-1], "<new>"], 41),
        ([*BASE[:30], "<new>"], 31),
    ],
    ids=["grown", "into the padding", "padded more", "no padding", "shifted", "reversed", "shrunk"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_go_with_their_tokens(
    tmp_path: Path, recipe_in: Any, base: dict[str, torch.Tensor], tokens: list[str], rows: int, dtype: torch.dtype
) -> None:
    expert = {name: values.to(dtype) for name, values in tuned(base, 1e-2, 1).items()}
    expert = model(tmp_path / "a", expert, tokens, rows=table(rows, 3, dtype))
    recipe = recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE)
    report = blend(recipe, tmp_path / "out", device="cpu")
    stored = read(tmp_path / "out")
    for name, values in stored.items():
        if name != EMBEDDING:
            assert same_bytes(values, expert[name].bfloat16())
    for row in range(48):
        token = BASE[row] if row < 40 else None
        known = token in tokens
        expected = expert[EMBEDDING][tokens.index(str(token))] if known else base[EMBEDDING][row]
        assert same_bytes(stored[EMBEDDING][row], expected.bfloat16()), row
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == json.loads(tokenizer(BASE))
    assert any("tokens are matched by their text" in note for note in report.notes)


def test_equal_tokens_are_blended_row_by_row_however_their_files_are_written(
    tmp_path: Path, recipe_in: Any, base: dict[str, torch.Tensor]
) -> None:
    expert = model(tmp_path / "a", tuned(base, 1e-2, 1), BASE, added=3)
    blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE), tmp_path / "out", device="cpu")
    assert same_bytes(read(tmp_path / "out")[EMBEDDING], expert[EMBEDDING])


def test_a_head_and_its_bias_go_with_the_embedding(tmp_path: Path, recipe_in: Any) -> None:
    tied = {"tie_word_embeddings": False}
    tensors = llama_tensors() | {"lm_head.weight": table(48, 8), "lm_head.bias": table(48, 9)[:, 0].clone()}
    model(tmp_path / "base", tensors, BASE, **tied)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    names = (EMBEDDING, "lm_head.weight", "lm_head.bias")
    moved = {name: torch.stack([2 * tensors[name][row] for row in order]) for name in names}
    model(tmp_path / "a", {**tensors, **moved}, [BASE[row] for row in order], **tied)
    blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE), tmp_path / "out", device="cpu")
    stored = read(tmp_path / "out")
    for name in names:
        assert stored[name][:40].equal(2 * tensors[name][:40])
        assert stored[name][40:].equal(tensors[name][40:])


def test_a_grown_head_that_the_base_ties_is_still_held_against_the_embedding(
    tmp_path: Path, recipe_in: Any, base: dict[str, torch.Tensor]
) -> None:
    rows = table(42, 3)
    for name, head in (("a", rows.clone()), ("b", 2 * rows)):
        model(tmp_path / name, {**base, "lm_head.weight": head}, [*BASE, "<x>", "<y>"], rows=rows)
    blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE), tmp_path / "out", device="cpu")
    assert read(tmp_path / "out")[EMBEDDING][:40].equal(rows[:40])
    with pytest.raises(UsageError, match=r"'lm_head.weight' differs from its"):
        blend(recipe_in(tmp_path, {"b": ("b", 1.0)}, WHOLE), tmp_path / "out2", device="cpu")


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (None, "its vocabulary has 42 rows, the base's 48.*put the tokenizer.json of both"),
        ([f"u{number}" for number in range(42)], "of the base's 40 tokens .* list only 0"),
    ],
)
def test_rows_that_nobody_can_name_are_refused(
    tmp_path: Path, recipe_in: Any, base: dict[str, torch.Tensor], tokens: list[str] | None, complaint: str
) -> None:
    model(tmp_path / "a", base, tokens, rows=table(42, 3))
    with pytest.raises(UsageError, match=complaint):
        plan_blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE))


def test_the_size_of_pieces_changes_no_row(tmp_path: Path, recipe_in: Any, base: dict[str, torch.Tensor]) -> None:
    model(tmp_path / "a", tuned(base, 1e-2, 1), [*BASE[::-1], "<new>"], rows=table(41, 3, torch.float32))
    plan = plan_blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE))
    shown = plan.experts[0].checkpoint
    with shown.reader() as reader:
        whole = reader.read(EMBEDDING)
        for size in (1, 7, 16, 100):
            pieces = [reader.read(EMBEDDING, start, min(start + size, 768)) for start in range(0, 768, size)]
            assert torch.cat(pieces).equal(whole)
        assert b"".join(map(bytes, reader.blocks(EMBEDDING))) == whole.view(torch.uint8).numpy().tobytes()
