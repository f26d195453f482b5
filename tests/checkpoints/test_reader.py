"""Positional reads: the right bytes, from many threads, and a clear word when the file changes under the run."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ktmerge.checkpoints import reader as reading
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.digests import digest_of
from ktmerge.errors import KtmergeError

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(33, 7, generator=generator).to(torch.bfloat16),
        "full": torch.randn(5, 5, generator=generator),
        "counts": torch.arange(9),
        "flags": torch.tensor([True, False, True]),
        "fp8": torch.randn(10, generator=generator).to(torch.float8_e5m2),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def root(tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    expected = expected.reshape(-1)
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_whole_tensors(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    with Checkpoint.open(root).reader() as reader:
        for name, tensor in tensors.items():
            found = reader.read(name)
            assert found.shape == (tensor.numel(),)
            assert same_bits(found, tensor), name


def test_ranges(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    with Checkpoint.open(root).reader() as reader:
        for start, stop in ((0, 0), (0, 1), (3, 200), (230, 231), (231, 231)):
            assert same_bits(reader.read("half", start, stop), tensors["half"].reshape(-1)[start:stop])
        assert same_bits(reader.read("counts", 4), tensors["counts"][4:])
        for start, stop in ((-1, 2), (0, 232), (5, 4)):
            with pytest.raises(ValueError, match="which has 231"):
                reader.read("half", start, stop)


def test_the_result_is_not_the_file(root: Path) -> None:
    before = (root / "model.safetensors").read_bytes()
    with Checkpoint.open(root).reader() as reader:
        reader.read("full").zero_()
        assert reader.read("full").abs().sum() > 0
    assert (root / "model.safetensors").read_bytes() == before


def test_blocks_are_the_bytes(root: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktmerge.checkpoints.reader.BLOCK", 64)
    with Checkpoint.open(root).reader() as reader:
        for name, tensor in tensors.items():
            found = b"".join(bytes(block) for block in reader.blocks(name))
            assert found == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_many_threads(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    flat = tensors["half"].reshape(-1)

    def check(seed: int) -> bool:
        start, stop = sorted(random.Random(seed).choices(range(232), k=2))
        return same_bits(reader.read("half", start, stop), flat[start:stop])

    with Checkpoint.open(root).reader() as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(400)))


def test_short_reads_are_continued(
    root: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:5]], offset))
    with Checkpoint.open(root).reader() as reader:
        assert same_bits(reader.read("half"), tensors["half"])


def test_truncated_before_and_while_reading(root: Path) -> None:
    path = root / "model.safetensors"
    checkpoint = Checkpoint.open(root)
    with checkpoint.reader() as reader:
        reader.read("counts")
        os.truncate(path, checkpoint.tensors["half"].begin + 4)
        with pytest.raises(KtmergeError, match=r"ends inside tensor 'half'; it was truncated"):
            reader.read("half")
        with pytest.raises(KtmergeError, match="was changed while it was in use"):
            reader.check_unchanged()
    with checkpoint.reader() as reader, pytest.raises(KtmergeError, match="was changed while it was in use"):
        reader.read("half")


def test_replaced_or_removed_between_header_and_read(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(root)
    with checkpoint.reader() as reader:
        reader.check_unchanged()
        save_file(tensors, root / "new.safetensors")
        os.replace(root / "new.safetensors", root / "model.safetensors")
        with pytest.raises(KtmergeError, match="was changed while it was in use"):
            reader.read("full")
        (root / "model.safetensors").unlink()
        for call in (reader.check_unchanged, lambda: reader.read("full")):
            with pytest.raises(KtmergeError, match=r"model\.safetensors: cannot be"):
                call()


def remembered(root: Path) -> Path:
    """The weights, written long ago, with their digest in memory."""
    path = root / "model.safetensors"
    os.utime(path, ns=(10**18, 10**18))
    digest_of(path)
    return path


@pytest.mark.parametrize("begun", [False, True])
def test_other_permissions_and_links_are_no_other_bytes(root: Path, begun: bool) -> None:
    path = remembered(root)
    checkpoint = Checkpoint.open(root)
    with checkpoint.reader() as reader, checkpoint.reader() as other:
        if begun:
            reader.read("full")
        path.chmod(0o600)
        os.link(path, root / "again")
        before = reader.read("half")
        reader.check_unchanged()
        other.check_unchanged()
        assert same_bits(before, other.read("half"))


def test_other_bytes_with_the_old_time_are_noticed(root: Path) -> None:
    path = remembered(root)
    with Checkpoint.open(root).reader() as reader:
        reader.read("full")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(10**18, 10**18))
        with pytest.raises(KtmergeError, match="whether its bytes are the same cannot be told"):
            reader.check_unchanged()


def test_what_was_never_read_before_cannot_be_told(root: Path) -> None:
    with Checkpoint.open(root).reader() as reader:
        reader.read("full")
        (root / "model.safetensors").chmod(0o600)
        with pytest.raises(KtmergeError, match="if only its permissions, owner or links"):
            reader.check_unchanged()


def test_read_errors_name_the_tensor(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with (
        Checkpoint.open(root).reader() as reader,
        pytest.raises(KtmergeError, match="'full' cannot be read: Input/output error"),
    ):
        reader.read("full")


def test_packed_types_have_bytes_but_no_elements(raw_file: Callable[..., Path]) -> None:
    header = {"p": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    path = raw_file(header, b"\x12\x34", name="model.safetensors")
    with Checkpoint.open(path.parent).reader() as reader:
        assert b"".join(reader.blocks("p")) == b"\x12\x34"
        with pytest.raises(KtmergeError, match="no element type for the safetensors type F4"):
            reader.read("p")


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "transformers", "numpy", "huggingface_hub")
    script = f"import sys, ktmerge.checkpoints; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_more_shards_than_files_that_may_be_open(make_checkpoint: MakeCheckpoint) -> None:
    tensors = {f"layer.{number}.weight": np.ones((2, 2), np.float32) for number in range(60)}
    checkpoint = Checkpoint.open(make_checkpoint(tensors=tensors, shards=60))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reading._allow_many_files.cache_clear()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with checkpoint.reader() as opened:
            assert all(opened.read(name).sum() == 4 for name in tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
