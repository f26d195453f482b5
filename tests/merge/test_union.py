"""Outputs that take in the tokens of their experts. The oracle works on dictionaries from token to row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import llama_tensors, read, same_bytes, tuned
from test_vocabularies import BASE, EMBEDDING, WHOLE, model, table

from ktmerge.errors import UsageError
from ktmerge.merge import blend
from ktmerge.merge.planning import plan_blend

UNION = {"vocabulary": "union"}


@pytest.mark.parametrize("rows", [48, 40])
def test_new_tokens_come_with_their_rows(tmp_path: Path, recipe_in: Any, rows: int) -> None:
    tensors = llama_tensors()
    base = model(tmp_path / "base", tensors, BASE, 2, rows=tensors[EMBEDDING][:rows].clone())
    tokens = {"a": [*BASE, "<x>", "<y>"], "b": ["<z>", *BASE, "<y>"], "c": BASE}
    experts = {}
    for number, (name, own) in enumerate(tokens.items()):
        moved = tuned(base, 1e-2, number)
        # the added tokens of ``b`` stand at both ends: all of its are listed as added
        added = {"a": 4, "b": len(own), "c": 2}[name]
        experts[name] = model(tmp_path / name, moved, own, added, rows=table(max(len(own), rows), 7 + number))
    recipe = recipe_in(tmp_path, {name: (name, 1.0) for name in tokens}, WHOLE, output=UNION)
    blend(recipe, tmp_path / "out", device="cpu")
    stored = read(tmp_path / "out")[EMBEDDING]
    assert len(stored) == max(rows, 43)
    wanted = {"<x>": ["a"], "<y>": ["a", "b"], "<z>": ["b"]}
    for row, (token, owners) in enumerate(wanted.items(), 40):
        given = [experts[name][EMBEDDING][tokens[name].index(token)].double() for name in owners]
        assert same_bytes(stored[row], torch.stack(given).mean(0).float().bfloat16())
    for row in range(40):
        deltas = [experts[name][EMBEDDING][tokens[name].index(BASE[row])].float() for name in tokens]
        assert torch.allclose(stored[row].float(), torch.stack(deltas).mean(0), rtol=1e-2, atol=1e-2)
    if rows == 48:
        assert stored[43:].equal(base[EMBEDDING][43:])

    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert {one["content"]: one["id"] for one in tokenizer["added_tokens"][-3:]} == {"<x>": 40, "<y>": 41, "<z>": 42}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(stored)


def test_transformers_loads_it_and_finds_the_tokens(tmp_path: Path, recipe_in: Any, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, tuned_model = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    tuned_model.resize_token_embeddings(len(tokenizer))
    tuned_model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    (tmp_path / "base").symlink_to(tiny_llama)
    recipe = recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE, output={**UNION, "dtype": "float32"})
    blend(recipe, tmp_path / "out", device="cpu")
    merged, own = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    text = "The <tool>quick</tool> fox"
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert own.convert_ids_to_tokens(own("<tool>")["input_ids"]) == ["<tool>"]
    ids = torch.tensor([own(text)["input_ids"]])
    assert torch.allclose(merged(ids).logits, tuned_model.float()(ids).logits, atol=1e-5)


def test_nothing_new_changes_nothing(tmp_path: Path, recipe_in: Any) -> None:
    base = model(tmp_path / "base", llama_tensors(), BASE, 2)
    model(tmp_path / "a", tuned(base, 1e-2, 1), BASE, 2)
    plan = plan_blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE, output=UNION))
    assert plan.texts == {}
    assert plan.base[EMBEDDING].shape == (48, 16)


def test_what_cannot_be_joined_is_refused(tmp_path: Path, recipe_in: Any) -> None:
    base = model(tmp_path / "base", llama_tensors(), BASE, 2)
    model(tmp_path / "a", base, [*BASE, "word"], 0)
    model(tmp_path / "b", base, None)
    model(tmp_path / "c", base, [*BASE, "<x>"], 3)
    with pytest.raises(UsageError, match=r"experts\.a: its new token 'word' is no added token"):
        plan_blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE, output=UNION))
    with pytest.raises(UsageError, match=r"experts\.b: has no tokenizer\.json"):
        plan_blend(recipe_in(tmp_path, {"b": ("b", 1.0), "c": ("c", 1.0)}, WHOLE, output=UNION))
    with pytest.raises(UsageError, match=r"union needs a tokenizer\.json"):
        plan_blend(recipe_in(tmp_path, {"c": ("c", 1.0)}, WHOLE, base="b", output=UNION))


def test_a_tokenizer_that_numbers_beyond_the_table_is_refused(tmp_path: Path, recipe_in: Any) -> None:
    base = model(tmp_path / "base", llama_tensors(), BASE, 2)
    document = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    document["added_tokens"][-1]["id"] = 10**12
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(document))
    model(tmp_path / "a", base, [*BASE, "<x>"], 3)
    with pytest.raises(UsageError, match="numbers tokens up to 1000000000000, but it has 48 rows"):
        plan_blend(recipe_in(tmp_path, {"a": ("a", 1.0)}, WHOLE, output=UNION))
