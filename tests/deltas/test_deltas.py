"""A model handed over as what it is apart from its base: the same bytes on the right base, refused on another."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ktmerge import api
from ktmerge.cli import _exit_code
from ktmerge.deltas.manifest import BLOBS, FILE
from ktmerge.errors import KtmergeError, UsageError

WEIGHTS = "model.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(64, 16).bfloat16(),
        "layer.weight": torch.randn(48, 40).bfloat16(),
        "half.weight": torch.randn(20, 20).half(),
        "wide.bias": torch.randn(33),
        "frozen.weight": torch.randn(8, 8).bfloat16(),
        "steps": torch.arange(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """``base`` and ``model``: changed, one tensor more, one of another shape, one of another type, NaN inside."""
    base = tensors()
    model = {name: value.clone() for name, value in base.items()}
    low = torch.randn(48, 3) @ torch.randn(3, 40) * 0.05
    model["layer.weight"] = (base["layer.weight"].float() + low).bfloat16()
    model["half.weight"][3, 4] = float("nan")
    model["embed.weight"] = torch.randn(70, 16).bfloat16()
    model["wide.bias"] = (base["wide.bias"] * 1.001).double()
    model["more.weight"] = torch.randn(5, 5)
    model["steps"] += 7
    for name, values in (("base", base), ("model", model)):
        folder = tmp_path / name
        folder.mkdir()
        save_file(values, folder / WEIGHTS, {"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "x"}')
        (folder / "tokenizer.json").write_text('{"of": "both"}')
    (tmp_path / "model" / "notes.md").write_text("only here")
    (tmp_path / "model" / "ktmerge.json").write_text('{"kind": "blend"}')
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_exact_delta_gives_every_byte_back(place: Path) -> None:
    report = api.export_delta(place / "base", place / "model", place / "delta")
    assert report.manifest.exact
    assert report.error == 0
    assert report.codings()["equal"] == 3
    assert sorted(contents(place / "delta")) == [BLOBS, FILE]
    assert str(place) not in (place / "delta" / FILE).read_text()
    api.apply_delta(place / "base", place / "delta", place / "again")
    assert contents(place / "again") == contents(place / "model")
    api.export_delta(place / "base", place / "model", place / "twin")
    assert contents(place / "twin") == contents(place / "delta")


def test_shards_and_index_come_back(place: Path) -> None:
    model = place / "model"
    values = tensors()
    (model / WEIGHTS).unlink()
    names = sorted(values)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, inside in shards.items():
        save_file({name: values[name] for name in inside}, model / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    report = api.export_delta(place / "base", model, place / "delta")
    assert set(report.codings()) == {"equal"}
    api.apply_delta(place / "base", place / "delta", place / "again")
    assert contents(place / "again") == contents(model)


def test_another_base_is_refused(place: Path) -> None:
    api.export_delta(place / "base", place / "model", place / "delta")
    shutil.copytree(place / "base", place / "other")
    data = bytearray((place / "other" / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (place / "other" / WEIGHTS).write_bytes(data)
    with pytest.raises(UsageError, match="is not as in the base that the delta was made from"):
        api.apply_delta(place / "other", place / "delta", place / "again")
    with pytest.raises(UsageError, match="is not the base of this delta, base"):
        api.apply_delta(place / "model", place / "delta", place / "again")
    (place / "base" / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json: is not as in the base"):
        api.apply_delta(place / "base", place / "delta", place / "again")
    assert not (place / "again").exists()
    assert [name for name in os.listdir(place) if name.startswith(".")] == []


@pytest.mark.parametrize("error", [0.2, 0.02])
def test_the_stated_error_holds(place: Path, error: float) -> None:
    exact = api.export_delta(place / "base", place / "model", place / "exact").size
    report = api.export_delta(place / "base", place / "model", place / "delta", error=error)
    assert not report.manifest.exact
    assert report.error <= error
    assert report.size <= exact + 2000
    api.apply_delta(place / "base", place / "delta", place / "again")
    with safe_open(place / "again" / WEIGHTS, "pt") as made, safe_open(place / "model" / WEIGHTS, "pt") as wanted:
        base = tensors()
        for name in wanted.keys():  # noqa: SIM118 - no mapping
            one, other = made.get_tensor(name), wanted.get_tensor(name)
            assert one.dtype == other.dtype
            if name == "layer.weight":
                change = (other.float() - base[name].float()).norm()
                assert 0 < float((one.float() - other.float()).norm() / change) <= error
            elif name in ("steps", "frozen.weight", "more.weight", "half.weight", "embed.weight"):
                assert torch.equal(one.nan_to_num(9), other.nan_to_num(9)), name


def test_broken_deltas_are_refused(place: Path) -> None:
    api.export_delta(place / "base", place / "model", place / "delta")
    blobs, text = (place / "delta" / BLOBS).read_bytes(), (place / "delta" / FILE).read_text()
    document: dict[str, Any] = json.loads(text)

    def refused(words: str) -> None:
        with pytest.raises(UsageError, match=words):
            api.apply_delta(place / "base", place / "delta", place / "again")
        assert not (place / "again").exists()

    (place / "delta" / BLOBS).write_bytes(blobs[: len(blobs) // 2])
    refused("cut short|ends too early")
    (place / "delta" / BLOBS).write_bytes(bytes(byte ^ 255 for byte in blobs))
    refused("broken")
    (place / "delta" / BLOBS).write_bytes(blobs)
    for change, words in (
        ({"ktmerge_delta": 2}, "upgrade ktmerge"),
        ({"files": {"../x": [1, [0, 1]]}}, "outside of the delta"),
        ({"others": {"/etc/x": {"size": 1, "sha256": "", "blob": [0, 1]}}}, "outside of the delta"),
        ({"tensors": {"a": {}}}, "the manifest is broken"),
        ({"tensors": []}, "the manifest is broken"),
        ({"others": {"bomb": {"size": 1 << 40, "sha256": "", "blob": [0, 1]}}}, "has more than"),
        ({"others": {"\ud800": {"size": 1, "sha256": "", "blob": [0, 1]}}}, "surrogates not allowed"),
        ({"others": {"x" * 300: {"size": 1, "sha256": "", "blob": None}}}, "cannot be looked up: File name too long"),
        ({"files": {WEIGHTS: [-1, [0, 1]]}}, "less than no bytes"),
        (
            {"files": {WEIGHTS: [100, document["files"][WEIGHTS][1]]}},
            "header of model.safetensors is broken: no header",
        ),
        ({"base": [[]] * 9999}, "holds more values than"),
    ):
        (place / "delta" / FILE).write_text(json.dumps({**document, **change}))
        refused(words)
    for alias in (WEIGHTS, f"./{WEIGHTS}"):
        others = {**document["others"], alias: document["others"]["notes.md"]}
        (place / "delta" / FILE).write_text(json.dumps({**document, "others": others}))
        refused("twice")
    (place / "delta" / FILE).write_text(json.dumps({**document, "tensors": {}}))
    refused("other tensors than the headers")
    one = document["tensors"]["layer.weight"]
    for change, words in (
        ({"sha256": "0" * 64}, "does not come out"),
        ({"end": 10**15}, "other tensors"),
        ({"end": float("inf")}, "the manifest is broken"),
        ({"pieces": [{**one["pieces"][0], "count": -1}]}, "the manifest is broken"),
    ):
        changed = {**document["tensors"], "layer.weight": {**one, **change}}
        (place / "delta" / FILE).write_text(json.dumps({**document, "tensors": changed}))
        refused(words)
    embed = {**document["tensors"]["embed.weight"], "base": "0" * 64}  # the base's has fewer rows
    changed = {**document["tensors"], "embed.weight": embed}
    (place / "delta" / FILE).write_text(json.dumps({**document, "tensors": changed}))
    refused("another number of elements than the base")


def test_files_without_end_are_not_waited_for(place: Path) -> None:
    api.export_delta(place / "base", place / "model", place / "delta")
    for name, words in ((BLOBS, "not a regular file"), (FILE, "is no delta")):
        (place / "delta" / name).unlink()
        os.mkfifo(place / "delta" / name)
        with pytest.raises(KtmergeError, match=words):
            api.apply_delta(place / "base", place / "delta", place / "again")
    assert not (place / "again").exists()


def test_files_that_fill_a_disk_are_refused_before_they_are_written(place: Path) -> None:
    api.export_delta(place / "base", place / "model", place / "delta")
    document = json.loads((place / "delta" / FILE).read_text())
    others = {"large.txt": {"size": 1 << 50, "sha256": "", "blob": None}}
    (place / "delta" / FILE).write_text(json.dumps({**document, "others": others}))
    with pytest.raises(KtmergeError, match=r"needs 1125899\.\d+ GB"):
        api.apply_delta(place / "base", place / "delta", place / "again")
    assert sorted(os.listdir(place)) == ["base", "delta", "model"]


def test_the_commands(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert _exit_code(["delta", "export", "base", "model", "--out", "delta"]) == 0
    assert "exact: the same bytes" in capsys.readouterr().out
    assert _exit_code(["delta", "export", "base", "model", "--out", "delta"]) == 2
    assert _exit_code(["delta", "export", "base", "model", "--out", "delta", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]
    assert _exit_code(["delta", "export", "base", "model", "--out", "delta2", "--error", "2"]) == 2
    assert _exit_code(["delta", "apply", "base", "delta", "--out", "again"]) == 0
    assert contents(place / "again") == contents(place / "model")
    assert _exit_code(["delta", "apply", "base", "model", "--out", "third"]) == 2
    assert "is no delta" in capsys.readouterr().err
