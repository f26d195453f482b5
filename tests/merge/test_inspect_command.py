"""``ktmerge inspect`` as people run it: what is printed, how wide, and what wrong input gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from merge_models import llama_tensors, tuned, write


def inspect(*arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", "ktmerge", "inspect", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def test_tables_warnings_and_a_picture(llavas: Path, tmp_path: Path) -> None:
    write(tmp_path / "alien", {**tuned(read_all(llavas / "base"), 1.0, 5)})
    arguments = llavas / "base", llavas / "a", f"second={llavas / 'b'}", tmp_path / "alien"
    printed = inspect(*arguments, "--plot", "moved.png", cwd=tmp_path).stdout
    lines = printed.splitlines()
    assert max(len(line) for line in lines if not line.startswith("warning:")) <= 120
    (vision,) = [line.split() for line in lines if line.startswith(" vision.layers ") and "a" in line.split()]
    assert vision[:3] == ["vision.layers", "3", "a"]
    assert any("a, second" in line for line in lines)
    assert any(line.startswith("warning: alien is not a fine-tune of this base") for line in lines)
    assert (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")
    assert "llm.layers[2]" not in printed
    assert " llm.layers[2] " in inspect(*arguments, "--layers", cwd=tmp_path).stdout
    document = json.loads(inspect(*arguments, "--json", cwd=tmp_path).stdout)
    assert set(document["models"]) == {"a", "second", "alien"}
    assert document["models"]["alien"]["parts"]["llm.layers"]["relative_norm"] > 0.5


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    from merge_models import read

    return {name: values for name, values in read(folder).items() if values.is_floating_point()}


def test_wrong_input_gets_one_sentence_and_code_2(tmp_path: Path) -> None:
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
        done = inspect(*arguments, cwd=tmp_path, code=2)
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""


def test_packed_weights_are_told_not_measured(tmp_path: Path) -> None:
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    config = {"quantization_config": {"quant_method": "gptq"}}
    write(tmp_path / "base", packed, config)
    write(tmp_path / "x", packed, config)
    printed = inspect("base", "x", "--plot", "x.png", cwd=tmp_path).stdout
    assert "warning: x: none of its weights could be measured" in printed
    assert (tmp_path / "x.png").exists()
