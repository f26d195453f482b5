"""Inspection: what is in a checkpoint and how far fine-tunes moved."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_models import Tensors, llama_tensors, read, same_bytes, tuned, write

from ktmerge.errors import UsageError
from ktmerge.merge import inspect
from ktmerge.merge.diagnostics.measures import ALL


def test_contents_by_part(llavas: Path) -> None:
    found = inspect(llavas / "base", headers_only=True)
    tensors = read(llavas / "base")
    assert sum(part.tensors for part in found.contents.values()) == len(tensors)
    assert sum(part.parameters for part in found.contents.values()) == sum(t.numel() for t in tensors.values())
    assert {"llm.layers", "vision.layers", "connector", "embed", "head", "norm"} <= set(found.contents)
    assert found.movements == {}
    assert json.dumps(found.to_json())


def test_parts_and_layers_equal_a_direct_computation(llamas: Path) -> None:
    found = inspect(llamas / "base", {name: llamas / name for name in "abc"})
    base, a, b, c = (read(llamas / name) for name in ("base", "a", "b", "c"))

    def whole(tensors: Tensors, part: str) -> torch.Tensor:
        return torch.cat([values.double().view(-1) for name, values in tensors.items() if part in name])

    for part, pattern in (("llm.layers", ".layers."), ("llm.layers[1]", ".layers.1."), ("embed", "embed"), ("all", "")):
        theta, first, second = (whole(tensors, pattern) for tensors in (base, a, b))
        first, second = first - theta, second - theta
        moved, pair = found.movement("a", part), found.pair("a", "b", part)
        assert moved is not None
        assert pair is not None
        assert moved.relative == pytest.approx(float(first.norm() / theta.norm()), rel=1e-12)
        assert moved.share == pytest.approx(float((first != 0).double().mean()), abs=1e-12)
        assert pair.cosine == pytest.approx(float(first @ second / first.norm() / second.norm()), abs=1e-12)
        both = (first != 0) & (second != 0)
        assert pair.conflict == pytest.approx(float(((first * second)[both] < 0).double().mean()), abs=1e-12)
    queries = found.movement("a", "llm.layers[0]", "q")
    assert queries is not None
    assert queries.elements == base["model.layers.0.self_attn.q_proj.weight"].numel()
    assert found.kinds("llm.layers[0]") == ["q", "k", "up", "down", "norm"]
    assert found.warnings == []
    frozen = [name for name in base if ".layers.1." in name and same_bytes(base[name], c[name])]
    assert frozen, "c left layer 1 as it was"
    for part, low, high in (("llm.layers[0]", 3, 3), ("llm.layers[1]", 2, 2), ("llm.layers", 2, 3), ("all", 2, 3)):
        effective = found.effective(part)
        assert effective is not None
        assert (effective.least, effective.most) == (low, high), part


def test_names_of_other_versions_are_followed(llavas: Path) -> None:
    found = inspect(llavas / "base", {"b": llavas / "b", "c": llavas / "c"})
    assert any("under other names" in line for _, line in found.differences["b"].lines())
    connector = found.movement("c", "connector")
    assert connector is not None
    assert connector.share == 1.0


def test_suspicious_fine_tunes_are_pointed_out(tmp_path: Path) -> None:
    base = llama_tensors(torch.float32)
    other = tuned(base, 0.02, 9)
    write(tmp_path / "base", base)
    write(tmp_path / "x", tuned(other, 1e-3, 1))
    write(tmp_path / "y", tuned(other, 1e-3, 2))
    write(tmp_path / "same", base)
    write(tmp_path / "alien", llama_tensors(torch.float32, seed=9))
    said = inspect(tmp_path / "base", {name: tmp_path / name for name in ("x", "y", "same", "alien")}).warnings
    assert [line.split()[0] for line in said] == ["x", "y", "same", "alien", "x"]
    assert "probably tuned from another base of this family" in said[0]
    assert said[2] == "same equals the base everywhere."
    assert "is not a fine-tune of this base" in said[3]
    assert "x and y moved in the same direction" in said[4]
    assert "they share a base that is not this one" in said[4]
    alike = tuned(base, 1e-3, 3)
    write(tmp_path / "p", alike)
    write(tmp_path / "q", tuned(alike, 1e-5, 4))
    (line,) = inspect(tmp_path / "base", {"p": tmp_path / "p", "q": tmp_path / "q"}).warnings
    assert "they learned the same" in line


def test_a_part_that_was_trained_anew_is_pointed_out(llavas: Path, tmp_path: Path) -> None:
    tensors = read(llavas / "a")
    generator = torch.Generator().manual_seed(8)
    for name, values in tensors.items():
        if "projector" in name:
            tensors[name] = values.std() * torch.randn(values.shape, generator=generator)
    write(tmp_path / "x", tensors)
    (line,) = inspect(llavas / "base", {"x": tmp_path / "x"}).warnings
    assert line.startswith("x: its connector has nothing of the base's (")
    assert "blend.where" in line


def test_a_fine_tune_too_fine_for_the_bases_type_is_pointed_out(tmp_path: Path) -> None:
    base = llama_tensors()
    write(tmp_path / "base", base)
    fine = {name: values.float() * (1 + 2**-12) for name, values in base.items()}
    write(tmp_path / "x", fine)
    write(tmp_path / "coarse", {name: values.float() * (1 + 2**-4) for name, values in base.items()})
    found = inspect(tmp_path / "base", {"x": tmp_path / "x", "coarse": tmp_path / "coarse"})
    (line,) = [line for line in found.warnings if "output.dtype" in line]
    assert line.startswith("x: 100% of its changes are under half a step")
    assert ("types", "14 tensors in F32, BF16 in the base") in found.differences["x"].lines()


def test_missing_and_misshapen_tensors_are_listed_not_fatal(tmp_path: Path) -> None:
    base = llama_tensors()
    write(tmp_path / "base", base)
    less = {name: values for name, values in base.items() if name != "model.norm.weight"}
    write(tmp_path / "x", {**less, "model.embed_tokens.weight": torch.ones(50, 16)})
    found = inspect(tmp_path / "base", {"x": tmp_path / "x"})
    lines = list(found.differences["x"].lines())
    assert ("tensors", "1 missing: model.norm.weight") in lines
    assert any("1 of another shape: model.embed_tokens.weight (BF16 [48, 16]" in line for _, line in lines)
    assert found.movement("x", "norm") is None
    whole = sum(values.numel() for values in base.values())
    share = 1 - (48 * 16 + 16) / whole
    assert found.coverage["x"] == pytest.approx(share)
    assert any(f"x has only {share:.1%} of the base's weights" in line for line in found.warnings)
    assert found.effective("norm") is None
    assert found.movement("x", "llm.layers") is not None


def test_what_cannot_be_held_against_the_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "base", llama_tensors())
    write(tmp_path / "z", {"something.else": torch.ones(2)})
    with pytest.raises(UsageError, match=r"z: shares no tensor .* architecture \(its .* 'something\.else', the base's"):
        inspect(tmp_path / "base", {"z": tmp_path / "z"})
    write(tmp_path / "wide", llama_tensors(width=32))
    with pytest.raises(UsageError, match=r"wide: every tensor .* another shape, .*another size of the same architect"):
        inspect(tmp_path / "base", {"wide": tmp_path / "wide"})


def test_zero_bases_give_no_infinite_json(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(values) for name, values in llama_tensors().items()}
    write(tmp_path / "base", zeros)
    write(tmp_path / "x", tuned(zeros, 1e-2, 1))
    found = inspect(tmp_path / "base", {"x": tmp_path / "x"})
    moved = found.movement("x", "norm")
    assert moved is not None
    assert math.isinf(moved.relative)
    json.dumps(found.to_json(), allow_nan=False)
    assert "∞" in str(list(found.tables()))
    assert "4G+" in str(list(found.tables())), "a step of zero is the least number there is"
    (said,) = found.warnings
    assert said.startswith("x changed matrices that are all 0 in the base")


def test_tables_fit_120_columns_and_fold_layers(llavas: Path) -> None:
    found = inspect(llavas / "base", {name: llavas / name for name in "abc"})
    for layers in (False, True):
        tables = list(found.tables(layers=layers))
        assert len(tables) == 4
        for columns, rows, _ in tables:
            assert all(len(row) == len(columns) for row in rows)
            if columns[0] == "part":
                widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
                assert sum(widths) + 3 * len(widths) <= 120
        parts = [row[0] for row in tables[1][1] if row[0]]
        expected = ["vision", "vision.layers", "connector", "embed", "llm.layers", "norm", "head"]
        if layers:
            expected[4:5] = [f"llm.layers[{i}]" for i in range(3)]
            expected[1:2] = [f"vision.layers[{i}]" for i in range(2)]
        assert parts == [*expected, "all"], "in the order in which the model uses them"


def test_long_names_lose_their_middle_unless_they_would_become_the_same(llavas: Path) -> None:
    long = "a-model-with-a-very-long-name"
    found = inspect(llavas / "base", {f"{long}-1": llavas / "a", f"{long}-2": llavas / "b"})
    rows = list(found.tables())[1][1]
    assert {row[2] for row in rows} == {"a-model-with…long-name-1", "a-model-with…long-name-2"}
    found = inspect(llavas / "base", {f"{long}-1-{long}": llavas / "a", f"{long}-2-{long}": llavas / "b"})
    rows = list(found.tables())[1][1]
    assert {row[2] for row in rows} == set(found.models)


def test_json_has_parts_layers_and_kinds(llavas: Path) -> None:
    found = inspect(llavas / "base", {"a": llavas / "a", "b": llavas / "b"})
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    layer = document["models"]["a"]["layers"]["llm.layers[2]"]
    assert document["models"]["a"]["coverage"] == 1
    assert set(layer) == {"relative_norm", "changed", "elements", "ulps", "kinds"}
    assert set(layer["kinds"]) == {"q", "k", "up", "down", "norm"}
    assert set(layer["ulps"]) == {"median", "p90", "p99", "max"}
    assert document["models"]["a"]["parts"].keys() == document["base"].keys()
    (pair,) = document["pairs"]
    assert pair["models"] == ["a", "b"]
    assert 0.4 < pair["parts"]["llm.layers"]["sign_conflict"] < 0.6
    assert document["effective_experts"]["parts"]["connector"] == {"min": 2, "max": 2, "mean": 2}


@pytest.mark.slow
def test_planning_and_headers_load_no_torch(llamas: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from ktmerge.merge import inspect
from ktmerge.merge.diagnostics.measures import ALL
from ktmerge.merge.importer import import_mergekit
from ktmerge.merge.needs import needs_of
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.registry import methods
from ktmerge.merge.settings import blend_setting
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Blend
folder = Path({str(llamas)!r})
inspect(folder / "base", {{"a": folder / "a"}}, headers_only=True)
import_mergekit("merge_method: ties\\nbase_model: b\\nmodels: [{{model: a, parameters: {{weight: 1}}}}]")
for name, method in methods().items():
    if any(needs_of(pipeline) for pipeline in blend_setting(Blend(method=name)).pipelines.values()):
        continue
    experts = dict.fromkeys("ab"[: method.experts[1] or 2])
    document = {{"ktmerge": 1, "base": "base", "blend": {{"method": name}}}}
    document["experts"] = {{x: {{"model": x}} for x in experts}}
    plan_blend(parse_recipe(document, "x", folder)).table()
print([name for name in ("torch", "transformers", "mergekit", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_experts_that_are_stacked_there_are_taken_one_by_one(tmp_path: Path) -> None:
    """As a model saves them under its names in memory, where the files of its publisher have them single."""
    block = "model.layers.0.block_sparse_moe"
    single = {f"{block}.experts.{n}.{w}.weight": torch.randn(6, 6) for n in range(3) for w in ("w1", "w3", "w2")}
    write(tmp_path / "base", {f"{block}.gate.weight": torch.randn(3, 6), **single})
    moved = {name: values + 0.01 for name, values in single.items()}
    names = list(moved)
    gate_up = [torch.cat([moved[names[3 * n]], moved[names[3 * n + 1]]]) for n in range(3)]
    there = "_orig_mod.model.layers.0.mlp"
    stacked = {
        f"{there}.gate.weight": torch.randn(3, 6),
        f"{there}.experts.gate_up_proj": torch.stack(gate_up),
        f"{there}.experts.down_proj": torch.stack([moved[names[3 * n + 2]] for n in range(3)]),
    }
    write(tmp_path / "a", stacked)
    found = inspect(tmp_path / "base", {"a": tmp_path / "a"})
    assert found.coverage["a"] == 1
    assert not found.differences["a"].tensors.keys() & {"missing", "extra"}
    moves = found.movement("a", ALL, "down")
    assert moves is not None
    assert moves.delta == pytest.approx(3 * 36 * 1e-4, rel=1e-3)
