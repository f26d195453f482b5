"""Memory estimates, and telling failures of the machine from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktmerge.tuners.machine import (
    choose_machine,
    deterministic,
    is_disk_trouble,
    is_out_of_memory,
    memory_available,
)


def test_free_memory_is_known() -> None:
    assert memory_available("cpu") > 0


def test_precision_is_as_asked() -> None:
    import torch

    assert choose_machine("float32").precision == "float32"
    if not torch.cuda.is_available():
        assert choose_machine("auto").precision == "float32"
        assert choose_machine("bfloat16").precision == "bfloat16"
    assert choose_machine("auto").threads >= 1


def test_out_of_memory_is_known_in_all_its_forms() -> None:
    import torch

    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_full_disk_is_known_in_all_its_forms(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises((RuntimeError, OSError)) as caught:
        torch.save({"a": torch.zeros(100_000)}, full)
    assert is_disk_trouble(caught.value)
    with pytest.raises(Exception, match=r".") as missing:
        save_file({"a": torch.zeros(3)}, tmp_path / "no" / "folder.safetensors")
    assert is_disk_trouble(missing.value)
    assert not is_disk_trouble(RuntimeError("shape mismatch"))


def test_determinism_is_only_asked_of_cuda() -> None:
    import torch

    with deterministic("cpu"):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic("cuda"):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
