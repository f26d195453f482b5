"""``ktmerge inspect`` as people run it: what is printed, how wide, and what wrong input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_models import llama_tensors, read, tuned, write

import ktmerge
from ktmerge import cli


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.mark.slow
def test_tables_warnings_and_a_picture(llavas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    floats = {name: values for name, values in read(llavas / "base").items() if values.is_floating_point()}
    write(tmp_path / "alien", tuned(floats, 1.0, 5))
    arguments = ["inspect", *map(str, (llavas / "base", llavas / "a", f"second={llavas / 'b'}", "alien"))]
    assert cli._exit_code([*arguments, "--plot", "moved.png"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(len(line) for line in lines if not line.startswith("warning:")) <= 120
    (vision,) = [line.split() for line in lines if line.startswith(" vision.layers ") and "a" in line.split()]
    assert vision[:3] == ["vision.layers", "3", "a"]
    assert any("a, second" in line for line in lines)
    assert any(line.startswith("warning: alien is not a fine-tune of this base") for line in lines)
    assert (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")
    assert "llm.layers[2]" not in printed
    assert cli._exit_code([*arguments, "--layers"]) == 0
    assert " llm.layers[2] " in capsys.readouterr().out
    assert cli._exit_code([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["models"]) == {"a", "second", "alien"}
    assert document["models"]["alien"]["parts"]["llm.layers"]["relative_norm"] > 0.5


def test_wrong_input_gets_one_sentence_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "base", llama_tensors())
    write(tmp_path / "wide", llama_tensors(width=32))
    write(tmp_path / "clip", {"vision_model.patch.weight": torch.ones(3)})
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        (["base", "nowhere"], "nowhere: no such folder"),
        (["empty", "x=base"], "empty: "),
        (["wide", "base"], "base: only the untuned model is called 'base'; call this one otherwise: name=folder"),
        (["base", "wide"], "another size of the same architecture"),
        (["base", "clip"], "clip: shares no tensor with the base; it is another architecture"),
        (["base", "wide", "wide"], "two models are called 'wide'; tell them apart with name=folder"),
        (["base", "x="], "'x=': give a model as folder or name=folder"),
        (["base", "--plot", "x.png"], "needs a tuned model to hold against the base"),
        (["base", "x=base", "--plot", "x.gif"], "can't draw '.gif' files"),
    ):
        assert cli._exit_code(["inspect", *arguments]) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert len(printed.err.splitlines()) == 1
        assert printed.out == ""


def test_headers_that_show_no_difference_are_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "x"):
        write(tmp_path / name, llama_tensors())
    write(tmp_path / "y", llama_tensors(dtype=torch.float16))
    assert cli._exit_code(["inspect", "base", "x", "y", "--headers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith(" x ")] == [
        ["x", "all", "nothing", "that", "headers", "and", "files", "show"]
    ]
    assert any(line.startswith(" y ") and "F16" in line for line in lines)


def test_from_python_one_model_needs_no_list_and_names_are_completed(tmp_path: Path) -> None:
    for name in ("base", "x"):
        write(tmp_path / name, llama_tensors())
    for given in (tmp_path / "x", str(tmp_path / "x")):
        assert list(ktmerge.inspect(tmp_path / "base", given, headers_only=True).differences) == ["x"]
    assert set(ktmerge.__all__) <= set(dir(ktmerge))


def test_packed_weights_are_told_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    config = {"quantization_config": {"quant_method": "gptq"}}
    write(tmp_path / "base", packed, config)
    write(tmp_path / "x", packed, config)
    assert cli._exit_code(["inspect", "base", "x", "--plot", "x.png"]) == 0
    assert "warning: x: none of its weights could be measured" in capsys.readouterr().out
    assert (tmp_path / "x.png").exists()
