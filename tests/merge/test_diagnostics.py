"""Inspection: what is in a checkpoint and how far fine-tunes moved."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_models import llama_tensors, read, tuned, write

from ktmerge.errors import UsageError
from ktmerge.merge import inspect


def test_contents_by_part(llavas: Path) -> None:
    found = inspect(llavas / "base", headers_only=True)
    tensors = read(llavas / "base")
    assert sum(part["tensors"] for part in found.contents.values()) == len(tensors)
    assert sum(part["parameters"] for part in found.contents.values()) == sum(t.numel() for t in tensors.values())
    assert {"llm.layers", "vision.layers", "connector", "embed", "head", "norm"} <= set(found.contents)
    assert found.movements == {}
    assert json.dumps(found.to_json())


def test_movements_equal_a_direct_computation(llamas: Path) -> None:
    found = inspect(llamas / "base", {name: llamas / name for name in "abc"})
    base, a, b = (read(llamas / name) for name in ("base", "a", "b"))
    names = [name for name in base if ".layers." in name]
    theta = torch.cat([base[name].double().view(-1) for name in names])
    first = torch.cat([a[name].double().view(-1) for name in names]) - theta
    second = torch.cat([b[name].double().view(-1) for name in names]) - theta
    moved = found.movements["a"]["llm.layers"]
    assert moved.relative == pytest.approx(float(first.norm() / theta.norm()), rel=1e-5)
    assert moved.share == pytest.approx(float((first != 0).double().mean()), abs=1e-12)
    pair = found.pairs["a", "b"]["llm.layers"]
    assert pair.cosine == pytest.approx(float(first @ second / first.norm() / second.norm()), abs=1e-5)
    both = (first != 0) & (second != 0)
    assert pair.conflict == pytest.approx(float(((first * second)[both] < 0).double().mean()), abs=1e-12)
    assert found.changed_by("llm.layers") == 3
    for columns, rows, _ in found.tables():
        assert all(len(row) == len(columns) for row in rows)
    assert found.warnings == []


def test_names_of_other_versions_are_followed(llavas: Path) -> None:
    found = inspect(llavas / "base", {"b": llavas / "b", "c": llavas / "c"})
    assert any("under other names" in line for line in found.differences["b"])
    assert found.movements["c"]["connector"].share == 1.0


def test_suspicious_fine_tunes_are_pointed_out(tmp_path: Path) -> None:
    base = llama_tensors(torch.float32)
    other = tuned(base, 0.2, 9)
    write(tmp_path / "base", base, {"rope_theta": 1e4})
    write(tmp_path / "x", tuned(other, 1e-3, 1), {"rope_theta": 1e6})
    write(tmp_path / "y", tuned(other, 1e-3, 2), {"rope_theta": 1e4})
    write(tmp_path / "same", base, {"rope_theta": 1e4})
    found = inspect(tmp_path / "base", {name: tmp_path / name for name in ("x", "y", "same")})
    text = "\n".join(found.warnings)
    assert "x moved by" in text
    assert "x and y moved in the same direction" in text
    assert "a base that is not this one" in text
    assert "same equals the base everywhere" in text
    assert any("config rope_theta: 10000.0 in the base, 1000000.0 here" in line for line in found.differences["x"])
    alike = tuned(base, 1e-2, 3)
    write(tmp_path / "p", alike)
    write(tmp_path / "q", tuned(alike, 1e-4, 4))
    pair = inspect(tmp_path / "base", {"p": tmp_path / "p", "q": tmp_path / "q"})
    assert any("they learned the same" in line for line in pair.warnings)


def test_missing_and_misshapen_tensors_are_listed_not_fatal(tmp_path: Path) -> None:
    base = llama_tensors()
    write(tmp_path / "base", base)
    less = {name: values for name, values in base.items() if name != "model.norm.weight"}
    write(tmp_path / "x", {**less, "model.embed_tokens.weight": torch.ones(50, 16)}, files={"a.txt": "1"})
    found = inspect(tmp_path / "base", {"x": tmp_path / "x"})
    assert any("1 tensors missing: model.norm.weight" in line for line in found.differences["x"])
    assert any("another shape" in line for line in found.differences["x"])
    assert "norm" not in found.movements["x"]
    write(tmp_path / "z", {"something.else": torch.ones(2)})
    with pytest.raises(UsageError, match="another architecture"):
        inspect(tmp_path / "base", {"z": tmp_path / "z"})


def test_zero_bases_give_no_infinite_json(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(values) for name, values in llama_tensors().items()}
    write(tmp_path / "base", zeros)
    write(tmp_path / "x", tuned(zeros, 1e-2, 1))
    found = inspect(tmp_path / "base", {"x": tmp_path / "x"})
    assert math.isinf(found.movements["x"]["norm"].relative)
    json.dumps(found.to_json(), allow_nan=False)


def test_planning_and_headers_load_no_torch(llamas: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from ktmerge.merge import inspect
from ktmerge.merge.importer import import_mergekit
from ktmerge.merge.plan import plan_blend
from ktmerge.merge.registry import methods
from ktmerge.recipes.load import parse_recipe
folder = Path({str(llamas)!r})
inspect(folder / "base", {{"a": folder / "a"}}, headers_only=True)
import_mergekit("merge_method: ties\\nbase_model: b\\nmodels: [{{model: a, parameters: {{weight: 1}}}}]")
for name, method in methods().items():
    experts = dict.fromkeys("ab"[: method.experts[1] or 2])
    document = {{"ktmerge": 1, "base": "base", "blend": {{"method": name}}}}
    document["experts"] = {{x: {{"model": x}} for x in experts}}
    plan_blend(parse_recipe(document, "x", folder)).summary()
print([name for name in ("torch", "transformers", "mergekit", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
