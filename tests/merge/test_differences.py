"""What stands beside the weights: configuration, tokenizer and files, and how their differences are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from merge_models import llama_tensors, write

from ktmerge.merge import inspect
from ktmerge.merge.diagnostics.differences import Differences
from ktmerge.merge.diagnostics.tokenizer import TokenizerFiles


def tokenizer(vocabulary: Any, added: dict[str, int] | None = None, **model: Any) -> str:
    """A ``tokenizer.json``."""
    special = [{"id": number, "content": token, "special": True} for token, number in (added or {}).items()]
    document = {"version": "1.0", "added_tokens": special, "model": {"type": "BPE", "vocab": vocabulary, **model}}
    return json.dumps(document)


def differ(
    folder: Path,
    base: dict[str, str],
    tuned: dict[str, str],
    configs: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
) -> Differences:
    """Compare two checkpoints of equal weights with other files beside them."""
    write(folder / "base", llama_tensors(), configs[0], files=base)
    write(folder / "x", llama_tensors(), configs[1], files=tuned)
    return inspect(folder / "base", {"x": folder / "x"}, headers_only=True).differences["x"]


def test_equal_checkpoints_have_no_differences(tmp_path: Path) -> None:
    files = {"tokenizer.json": tokenizer({"a": 0}), "merges.txt": "a b", "chat_template.jinja": "x", "code/m.py": "1"}
    found = differ(tmp_path, files, files)
    assert list(found.lines()) == []
    assert found.vocabulary == (1, 1)


def test_tokens_added_removed_renamed_and_moved(tmp_path: Path) -> None:
    base = tokenizer({"a": 0, "b": 1, "c": 2, "d": 3}, {"<reserved_0>": 4, "<reserved_1>": 5, "<gone>": 6})
    tuned = tokenizer({"a": 0, "c": 1, "b": 2, "d": 3}, {"<box>": 4, "<reserved_1>": 5, "<ref>": 7, "</ref>": 8})
    found = differ(tmp_path, {"tokenizer.json": base}, {"tokenizer.json": tuned})
    assert found.tokens == {
        "added": ["<ref>", "</ref>"],
        "removed": ["<gone>"],
        "renamed": ["<reserved_0> is <box> here"],
        "moved": ["b", "c"],
    }
    assert list(found.lines()) == [
        ("vocabulary", "7 tokens in the base, 8 here"),
        ("vocabulary", "2 tokens added: <ref>, </ref>"),
        ("vocabulary", "1 token removed: <gone>"),
        ("vocabulary", "1 token renamed: <reserved_0> is <box> here"),
        ("vocabulary", "2 tokens moved: b, c"),
    ]
    assert found.to_json()["vocabulary"] == {"base": 7, "here": 8, **found.tokens}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": tokenizer({"a": 0, "b": 1}, {"<s>": 2})},
        {"tokenizer.json": tokenizer([["a", -1.0], ["b", -2.0]], {"<s>": 2}, unk_id=0)},
        {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "", "added_tokens.json": '{"<s>": 2}'},
        {
            "vocab.txt": "a\nb\n",
            "tokenizer_config.json": '{"added_tokens_decoder": {"2": {"content": "<s>", "special": true}}}',
        },
    ],
    ids=["bpe", "unigram", "vocab.json", "vocab.txt"],
)
def test_tokens_are_read_from_every_kind_of_file(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert TokenizerFiles.read(tmp_path).tokens == {"a": 0, "b": 1, "<s>": 2}


def test_the_same_tokenizer_in_other_words_is_no_difference(tmp_path: Path) -> None:
    base = {
        "tokenizer.json": tokenizer({"a": 0, "b": 1}, merges=["a b"], dropout=None, byte_fallback=False),
        "tokenizer_config.json": '{"eos_token": "</s>", "chat_template": "{{ x }}\\n"}',
    }
    tuned = {
        "tokenizer.json": tokenizer({"b": 1, "a": 0}, merges=[["a", "b"]]),
        "tokenizer_config.json": '{"eos_token": {"content": "</s>"}}',
        "chat_template.jinja": "{{ x }}",
    }
    assert list(differ(tmp_path, base, tuned).lines()) == []


def test_special_tokens_template_rules_and_settings(tmp_path: Path) -> None:
    base = {
        "tokenizer.json": tokenizer({"a": 0}, merges=["a b"]),
        "tokenizer_config.json": '{"eos_token": "</s>", "padding_side": "left"}',
        "special_tokens_map.json": '{"bos_token": "<s>"}',
    }
    tuned = {
        "tokenizer.json": tokenizer({"a": 0}, merges=["b a"]),
        "tokenizer_config.json": '{"eos_token": "<|im_end|>", "padding_side": "right", "chat_template": "12345"}',
    }
    assert list(differ(tmp_path, base, tuned).lines()) == [
        ("tokenizer", "eos_token: </s> in the base, <|im_end|> here"),
        ("tokenizer", "rules that cut text into tokens: one set in the base, another here"),
        ("tokenizer", "padding_side: left in the base, right here"),
        ("tokenizer", "only in the base: bos_token <s>"),
        ("tokenizer", "only here: chat template 5 characters"),
    ]


def test_a_template_of_the_same_length_is_told_apart(tmp_path: Path) -> None:
    found = differ(tmp_path, {"chat_template.jinja": "abc"}, {"chat_template.json": '{"chat_template": "abd"}'})
    assert list(found.lines()) == [
        ("tokenizer", "chat template: 3 characters in the base, another of 3 characters here")
    ]


def test_settings_are_listed_and_those_of_one_side_gathered(tmp_path: Path) -> None:
    base = {"text_config": {"rope_theta": 1e4, "dtype": "float32"}, "a": 1, "b": 2, "gone": [1]}
    tuned = {"text_config": {"rope_theta": 1e6, "dtype": "bfloat16"}, "a": 1, "b": 3}
    tuned |= {f"new_{number}": number for number in range(5)}
    generation = {"generation_config.json": '{"temperature": 0.6}'}, {"generation_config.json": '{"temperature": 1.0}'}
    found = differ(tmp_path, *generation, (base, tuned))
    assert list(found.lines()) == [
        ("config", "b: 2 in the base, 3 here"),
        ("config", "text_config.rope_theta: 10000.0 in the base, 1000000.0 here"),
        ("config", "generation_config: temperature: 0.6 in the base, 1.0 here"),
        ("config", "only in the base: gone [1]"),
        ("config", "only here: new_0 0, new_1 1, new_2 2, and 2 more"),
    ]
    assert {"where": "b", "base": 2, "here": 3} in found.to_json()["config"]
    assert len(found.config) == 9


def test_what_could_steer_a_terminal_is_shown_as_escapes(tmp_path: Path) -> None:
    tuned = {"tokenizer.json": tokenizer({"a": 0, "\n\x1b[31m": 1})}
    found = differ(tmp_path, {"tokenizer.json": tokenizer({"a": 0})}, tuned, ({"x": "1"}, {"x": "\x1b]0;\x07"}))
    assert list(found.lines()) == [
        ("config", "x: 1 in the base, \\x1b]0;\\x07 here"),
        ("vocabulary", "1 tokens in the base, 2 here"),
        ("vocabulary", "1 token added: \\n\\x1b[31m"),
    ]


def test_files_of_other_bytes_are_named(tmp_path: Path) -> None:
    base = {"modeling_x.py": "1", "a/b.txt": "1", "README.md": "base", "tokenizer.model": "\x00"}
    tuned = {"modeling_x.py": "2", "c.txt": "1", "README.md": "tuned", "tokenizer.model": "\x01"}
    assert list(differ(tmp_path, base, tuned).lines()) == [
        ("files", "2 changed: modeling_x.py, tokenizer.model"),
        ("files", "1 missing: a/b.txt"),
        ("files", "1 only here: c.txt"),
    ]


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"model": 3, "added_tokens": [3, {}], "x": []}', "\x00\x01"])
def test_broken_files_are_differences_not_failures(tmp_path: Path, text: str) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "added_tokens.json")
    good = {"tokenizer.json": tokenizer({"a": 0}), "generation_config.json": "{}"}
    found = differ(tmp_path, good, dict.fromkeys((*names, "generation_config.json", "chat_template.json"), text))
    json.dumps(found.to_json())
    assert list(found.lines())
