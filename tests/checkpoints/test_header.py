"""The header parser against the reference library, and against everything a broken or hostile file can say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from letters import LETTERS
from safetensors.torch import save, save_file

from ktmerge.checkpoints.dtypes import BITS, tag_of, torch_dtype
from ktmerge.checkpoints.header import FilePlan, build_header, read_header
from ktmerge.errors import UsageError

RawFile = Callable[..., Path]
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: str
    shape: tuple[int, ...]


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    types = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    tensors = {f"t.{dtype}": torch.arange(6).reshape(3, 2).to(dtype) for dtype in types}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "fp8": torch.ones(3).to(torch.float8_e4m3fn)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, {"format": "pt", "note": "é"})

    header = read_header(path, "m.safetensors")

    content = path.read_bytes()
    found = {info.name: info for info in header.tensors}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert info.shape == tensor.shape
        assert torch_dtype(info.dtype) == tensor.dtype
        assert tag_of(tensor.dtype) == info.dtype
        assert content[info.begin : info.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert found["scalar"].numel == 1
    assert found["empty"].numel == 0
    assert found["t.torch.bfloat16"].is_float
    assert not found["t.torch.int64"].is_float
    assert not found["fp8"].is_float
    assert header.metadata == {"format": "pt", "note": "é"}
    assert [info.begin for info in header.tensors] == sorted(info.begin for info in header.tensors)
    assert header.stamp.size == len(content)


MALFORMED: list[tuple[Any, bytes, str]] = [
    ([], b"", "not a JSON object"),
    (b"{", b"", "not JSON"),
    (b'"text"', b"", "not a JSON object"),
    (b' {"a": 1}', b"", "not a JSON object"),
    (b"\xff\xfe{}", b"", "not UTF-8"),
    (b"[" * 100_000, b"", "nested too deeply|not JSON"),
    (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}', b"", "key 'a' stands twice"),
    (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}', b"", "key 'dtype' stands twice"),
    (b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', b"", "not plain text"),
    ({"a\x1b[2Jb": ONE}, bytes(8), r"name 'a\\x1b\[2Jb' is not plain text"),
    ({"a\nb": ONE}, bytes(8), "not plain text"),
    ({"a": 3}, b"", "tensor 'a' is not described by"),
    ({"a": {"dtype": "F32", "shape": [2]}}, b"", "tensor 'a' is not described by"),
    ({"a": {**ONE, "extra": 1}}, bytes(8), "tensor 'a' is not described by"),
    ({"a": {**ONE, "dtype": "F31"}}, bytes(8), "tensor 'a' has the unknown type 'F31'.* Did you mean 'F32'"),
    ({"a": {**ONE, "dtype": 32}}, bytes(8), "unknown type"),
    ({"a": {**ONE, "dtype": ["F32"]}}, bytes(8), "unknown type"),
    ({"a": {**ONE, "shape": 2}}, bytes(8), "tensor 'a' has a shape that is not"),
    ({"a": {**ONE, "shape": [2.0]}}, bytes(8), "has a shape that is not"),
    ({"a": {**ONE, "shape": [True, 2]}}, bytes(8), "has a shape that is not"),
    ({"a": {**ONE, "shape": [-2]}}, bytes(8), "has a shape that is not"),
    ({"a": {**ONE, "shape": [2**63, 0]}}, bytes(8), "has a shape that is not"),
    ({"a": {**ONE, "shape": [1] * 65}}, bytes(8), "has a shape that is not"),
    ({"a": {**ONE, "shape": [2**62, 4, 2]}}, bytes(8), r"tensor 'a' has shape .* but 8 are given"),
    ({"a": {**ONE, "shape": [3]}}, bytes(8), "takes 12 bytes, but 8 are given"),
    ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2), "takes 1.5 bytes"),
    ({"a": {**ONE, "data_offsets": [0, 8, 9]}}, bytes(8), "data_offsets that are not"),
    ({"a": {**ONE, "data_offsets": [-8, 0]}}, bytes(8), "data_offsets that are not"),
    ({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8), "ends .* before it begins"),
    ({"a": {**ONE, "data_offsets": [0, 16], "shape": [4]}}, bytes(8), "tensor 'a' reaches to byte 16 .* truncated"),
    ({"a": {**ONE, "data_offsets": [4, 12]}}, bytes(12), "tensor 'a' leaves a hole"),
    ({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12), "tensor 'b' overlaps"),
    ({"a": ONE, "b": ONE}, bytes(8), "overlaps"),
    ({"a": ONE}, bytes(11), "3 bytes at its end belong to no tensor"),
    ({}, bytes(1), "1 bytes at its end"),
    ({"a": ONE, "__metadata__": {"k": 1}}, bytes(8), "__metadata__ is not"),
    ({"a": ONE, "__metadata__": []}, bytes(8), "__metadata__ is not"),
]


@pytest.mark.parametrize(("header", "data", "reason"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_is_refused_with_file_and_tensor(raw_file: RawFile, header: Any, data: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        read_header(raw_file(header, data), "raw.safetensors")
    assert "raw.safetensors" in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("length", [9, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(raw_file: RawFile, length: int) -> None:
    with pytest.raises(UsageError, match=r"header claims \d+ bytes"):
        read_header(raw_file(b"{}", length=length), "raw.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_stub_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stub.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="fewer than the 8"):
        read_header(path, "stub.safetensors")


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UsageError, match="git lfs pull"):
        read_header(path, "m.safetensors")


@pytest.mark.parametrize(
    ("content", "said"), [(b"<!DOCTYPE html><html>", "a web page"), (b"PK\x03\x04" + bytes(30), "a zip archive")]
)
def test_what_was_downloaded_instead_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_header(path, "m.safetensors")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a regular file"), (".", "Is a directory"), ("none", "No such file")):
        with pytest.raises(UsageError, match=reason):
            read_header(tmp_path / name, name)


def reference_accepts(content: bytes) -> dict[str, tuple[str, list[int]]] | None:
    try:
        found = safetensors.deserialize(content)
    except Exception:  # the library has several error types; any of them is a refusal
        return None
    return {name: (tensor["dtype"], list(tensor["shape"])) for name, tensor in found}


def check_like_reference(path: Path, content: bytes) -> bool:
    """Never anything but a UsageError; and whatever we accept, the reference library reads the same."""
    path.write_bytes(content)
    try:
        header = read_header(path, path.name)
    except UsageError:
        return False
    expected = reference_accepts(content)
    assert expected == {info.name: (info.dtype, list(info.shape)) for info in header.tensors}
    return True


def sample() -> bytes:
    tensors = {
        "a.weight": torch.zeros(2, 3),
        "b.bias": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.tensor(3),
    }
    return save(tensors, {"format": "pt"})


@FUZZ
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 400),
)
def test_bits_flipped_and_truncated(tmp_path: Path, edits: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(sample())
    for position, value in edits:
        content[position % len(content)] = value
    check_like_reference(tmp_path / "fuzz.safetensors", bytes(content[:cut]))


# A grammar of headers, near to valid ones and far from them.
SMALL = st.integers(-1, 6) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 1.5, True, None, "2"])
OFFSET = st.integers(0, 32) | SMALL
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "f32", "", 4]),
        "shape": st.lists(SMALL, max_size=3) | SMALL,
        "data_offsets": st.lists(OFFSET, min_size=2, max_size=2) | st.lists(OFFSET, max_size=3),
    }
)
DOCUMENT = st.dictionaries(st.text(LETTERS, max_size=4) | st.just("__metadata__"), ENTRY | SMALL, max_size=3)


@FUZZ
@given(document=DOCUMENT, size=st.integers(0, 48))
def test_any_json_header(tmp_path: Path, document: dict[str, Any], size: int) -> None:
    text = json.dumps(document).encode()
    check_like_reference(tmp_path / "fuzz.safetensors", len(text).to_bytes(8, "little") + text + bytes(size))


SPECS = st.lists(
    st.builds(
        Spec,
        name=st.text(LETTERS, min_size=1, max_size=6).filter(str.isprintable),
        dtype=st.sampled_from([tag for tag, bits in BITS.items() if bits >= 8]),
        shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)


@FUZZ
@given(specs=SPECS, metadata=st.dictionaries(st.text(LETTERS, max_size=5), st.text(LETTERS, max_size=5), max_size=2))
def test_built_headers_are_read_alike_by_us_and_by_the_reference(
    tmp_path: Path, specs: list[Spec], metadata: dict[str, str]
) -> None:
    text, placed = build_header(FilePlan("f.safetensors", specs, metadata))
    size = max([len(text), *(info.end for info in placed)])
    content = text + bytes(size - len(text))
    assert len(text) % 8 == 0
    assert check_like_reference(tmp_path / "f.safetensors", content)
    header = read_header(tmp_path / "f.safetensors", "f.safetensors")
    assert header.metadata == metadata
    assert {i.name: i for i in header.tensors} == {i.name: i for i in placed}
    assert {(i.name, i.dtype, i.shape) for i in placed} == {(s.name, s.dtype, s.shape) for s in specs}
    for info in placed:
        assert info.begin % (BITS[info.dtype] // 8) == 0, "torch could not view it"


def test_order_is_kept_where_alignment_allows() -> None:
    specs = [Spec("z", "F32", (2,)), Spec("a", "F32", (3,)), Spec("m", "BF16", (3,)), Spec("b", "U8", (1,))]
    _, placed = build_header(FilePlan("f", specs))
    assert [info.name for info in placed] == ["z", "a", "m", "b"]


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([Spec("a", "F32", (1,)), Spec("a", "F16", (1,))], "'a' is planned twice"),
        ([Spec("__metadata__", "F32", (1,))], "reserved"),
        ([Spec("a", "F33", (1,))], "unknown type F33"),
        ([Spec("a", "F4", (3,))], "no whole bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused(specs: list[Spec], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        build_header(FilePlan("f", specs))


def test_a_question_ends_a_sentence(raw_file: RawFile) -> None:
    path = raw_file({"w": {"dtype": "U4", "shape": [2], "data_offsets": [0, 1]}}, b"x")
    with pytest.raises(UsageError, match=r"unknown type 'U4'\. Did you mean 'U64'\?$"):
        read_header(path, "w")
