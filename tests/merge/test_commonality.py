"""How much of what fine-tunes changed is common: on models where the answer is known, and as people ask for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_models import Tensors, llama_tensors, read, write

from ktmerge import cli
from ktmerge.errors import UsageError
from ktmerge.merge import inspect

QUERY, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def moved(base: Tensors, **deltas: torch.Tensor) -> Tensors:
    return {name: values + deltas.get(name.replace(".", "_"), torch.zeros(())) for name, values in base.items()}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Two that agree on layer 0, and read different inputs in layer 1."""
    base = llama_tensors(torch.float32)
    first, second = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(3))
    first[:, 8:], second[:, :8] = 0, 0
    same = torch.randn(16, 16, generator=torch.Generator().manual_seed(4))
    for name, own in (("a", first), ("b", second)):
        write(tmp_path / name, moved(base, **{QUERY.replace(".", "_"): same, UP.replace(".", "_"): own}))
    write(tmp_path / "base", base)
    return tmp_path


def test_what_is_alike_is_common_and_what_reads_other_inputs_is_not(models: Path) -> None:
    found = inspect(models / "base", {name: models / name for name in "ab"}, common=True)
    alike, apart = found.commonality("llm.layers[0]"), found.commonality("llm.layers[1]")
    assert alike is not None
    assert apart is not None
    assert alike.share == pytest.approx(1.0, abs=1e-5)
    assert apart.share == pytest.approx(0.0, abs=1e-5)
    assert alike.quantile(0.1) == pytest.approx(1.0, abs=1e-2)
    assert apart.quantile(0.5) == pytest.approx(0.5, abs=2e-3)
    both = found.commonality("llm.layers")
    assert both is not None
    assert both.share == pytest.approx(alike.energy / (alike.energy + apart.energy), rel=1e-4)
    assert found.commonality("embed") is None
    assert inspect(models / "base", {name: models / name for name in "ab"}).commonality("llm.layers") is None


def test_share_equals_a_direct_computation(llamas: Path) -> None:
    found = inspect(llamas / "base", {name: llamas / name for name in "abc"}, common=True)
    base, *own = (read(llamas / name) for name in ("base", "a", "b", "c"))
    common = energy = 0.0
    for name in base:
        if ".layers.0." not in name or base[name].dim() != 2:
            continue
        deltas = [(one[name].float() - base[name].float()).double().numpy() for one in own]
        covariance = sum(delta.T @ delta / (delta**2).sum() for delta in deltas)
        v = np.linalg.eigh(covariance)[1]
        a = np.stack([delta @ v for delta in deltas])
        kappa = (a.sum(0) ** 2).sum(0) / (3 * (a**2).sum((0, 1)))
        gate = np.clip((kappa - 1 / 3) / (2 / 3), 0, 1)
        common += 3 * ((a.mean(0) * gate) ** 2).sum()
        energy += (a**2).sum()
    told = found.commonality("llm.layers[0]")
    assert told is not None
    assert told.share == pytest.approx(common / energy, rel=1e-6)
    assert told.energy == pytest.approx(energy, rel=1e-6)


def test_tables_and_json_tell_it(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", *(str(models / name) for name in ("base", "a", "b"))]
    assert cli._exit_code([*arguments, "--common", "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "in common" in printed
    (row,) = [line.split() for line in printed.splitlines() if line.startswith(" llm.layers[0] ") and "100.0%" in line]
    assert row[1:4] == ["2", "1", "100.0%"]
    assert cli._exit_code([*arguments, "--common", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["common"]
    assert told["layers"]["llm.layers[0]"]["share"] == pytest.approx(1.0, abs=1e-5)
    assert told["parts"]["all"]["maps"] == 2
    assert cli._exit_code([*arguments, "--json"]) == 0
    assert "common" not in json.loads(capsys.readouterr().out)


def test_it_takes_two_tuned_models_and_their_weights(models: Path) -> None:
    with pytest.raises(UsageError, match="two or more tuned models"):
        inspect(models / "base", {"a": models / "a"}, common=True)
    with pytest.raises(UsageError, match="without --headers"):
        inspect(models / "base", {name: models / name for name in "ab"}, common=True, headers_only=True)
