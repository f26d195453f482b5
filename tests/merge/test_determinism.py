"""The same recipe and inputs give the same bytes, whatever the threads, pieces, shards, order and kernels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ktmerge.merge import blend, fused, general, selection
from ktmerge.recipes.load import parse_recipe

EXPERTS = ("a", "b", "c")
BLENDS: dict[str, dict[str, Any]] = {
    "ties": {"method": "ties", "density": 0.3},
    "ties global": {"method": "ties", "density": 0.3, "scope": "global", "where": [{"part": "embed", "keep": "b"}]},
    "dare_ties": {"method": "dare_ties", "density": 0.4, "lambda": 0.9},
    "task arithmetic": {"method": "task_arithmetic"},
    "spectral": {"method": "swudi_a_svc"},  # decompositions, several at a time
    "majority": {"method": "ties", "tie": "majority"},  # not a program of the compiled kernels
    "della": {"method": "della"},  # whole tensors, random choice by rank
    "lines": {"stages": {"transform": "breadcrumbs", "combine": "sum", "scale": {"lines": {"alpha": "auto"}}}},
}


QUICK = ("ties global", "spectral", "della")  # the kernels with a threshold of all, maps, whole tensors
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in BLENDS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bf16, with many equal magnitudes; sizes that pieces do not divide; one tensor that nobody changed."""
    folder = tmp_path_factory.mktemp("models")
    common = torch.Generator().manual_seed(0)
    base = {
        "model.embed_tokens.weight": torch.randn(211, 37, generator=common) * 0.02,
        "model.layers.0.mlp.up_proj.weight": torch.randn(301, 63, generator=common) * 0.02,
        "model.layers.0.mlp.down_proj.weight": torch.randn(63, 301, generator=common) * 0.02,
        "model.norm.weight": torch.full((63,), 0.02),
    }
    for seed, name in enumerate(("base", *EXPERTS)):
        own = torch.Generator().manual_seed(seed)
        moved = {
            key: value if seed == 0 or "down" in key else value + torch.randn(value.shape, generator=own) * 5e-4
            for key, value in base.items()
        }
        save(folder / name, [{key: value.to(torch.bfloat16) for key, value in moved.items()}])
    return folder


def save(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def recipe(blend_: dict[str, Any], experts: tuple[str, ...] = EXPERTS) -> dict[str, Any]:
    return {
        "ktmerge": 1,
        "base": "base",
        "experts": {name: {"model": name, "weight": 1 + "abc".index(name) / 2} for name in experts},
        "blend": blend_,
        "output": {"rounding": "stochastic"},
        "seed": 11,
    }


def digest(folder: Path, out: Path, document: dict[str, Any]) -> str:
    """Of every tensor's bytes by name, however they are sharded."""
    blend(parse_recipe(document, "test", folder), out, overwrite=True, device="cpu")
    found = hashlib.sha256()
    tensors = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    for key in sorted(tensors):
        found.update(key.encode() + tensors[key].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def expected(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The digest of a blend as this machine makes it when left alone."""
    folder = tmp_path_factory.mktemp("expected")
    return cache(lambda kind: digest(models, folder / "out", recipe(BLENDS[kind])))


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_pieces_do_not_show(
    kind: str, models: Path, expected: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, alone = recipe(BLENDS[kind]), expected(kind)
    for cores, piece, held in [(1, 1 << 20, 1 << 27), (7, 1 << 20, 1 << 27), (3, 512, 1 << 27), (2, 1 << 20, 1 << 17)]:
        monkeypatch.setattr(fused, "cores", lambda count=cores: count)
        monkeypatch.setattr(general, "cores", lambda count=cores: count)
        monkeypatch.setattr(fused, "PIECE", piece)
        monkeypatch.setattr(general, "CHUNK", piece)
        monkeypatch.setattr(fused, "HELD", held)
        assert digest(models, tmp_path / "out", document) == alone, (cores, piece, held)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("ties", marks=pytest.mark.slow), "ties global"])
def test_samples_and_noted_candidates_do_not_show(
    kind: str, models: Path, expected: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sample or none, and with room for all candidates of a threshold, for some, or for none."""
    alone = expected(kind)
    for large, few in [(1, 1 << 21), (1, 300), (1, 0), (1 << 30, 1 << 21), (1 << 30, 0)]:
        monkeypatch.setattr(selection, "_LARGE", large)
        monkeypatch.setattr(selection, "_FEW", few)
        monkeypatch.setattr(fused, "PIECE", 1 << 10)
        assert digest(models, tmp_path / "out", recipe(BLENDS[kind])) == alone, (large, few)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_order_and_shards_do_not_show(
    kind: str, models: Path, expected: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = expected(kind)
    monkeypatch.setenv("KTMERGE_KERNELS", "reference")
    assert digest(models, tmp_path / "out", recipe(BLENDS[kind])) == alone
    monkeypatch.delenv("KTMERGE_KERNELS")
    assert digest(models, tmp_path / "out", recipe(BLENDS[kind], ("c", "a", "b"))) == alone
    other = tmp_path / "sharded"
    other.mkdir()
    for number, name in enumerate(("base", *EXPERTS)):
        tensors = load_file(models / name / "model.safetensors")
        names = sorted(tensors, reverse=bool(number % 2))
        cut = 1 + number % 3
        save(other / name, [{key: tensors[key] for key in part} for part in (names[:cut], names[cut:])])
    assert digest(other, tmp_path / "out", recipe(BLENDS[kind])) == alone


@pytest.mark.slow
def test_another_process_on_one_core_writes_the_same_files(models: Path, tmp_path: Path) -> None:
    """Nor do the hash seed of the process, its folder or its environment show in any file."""
    path = models / "recipe.yaml"
    path.write_text(json.dumps(recipe(BLENDS["ties global"])))
    found = []
    for number, cores in enumerate([{0}, os.sched_getaffinity(0)]):
        out = tmp_path / str(number) / "out"
        command = [sys.executable, "-m", "ktmerge", "blend", "--recipe", str(path), "--out", str(out)]
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": str(number + 1)}
        bind = partial(os.sched_setaffinity, 0, cores)
        run = subprocess.run(command, env=environment, preexec_fn=bind, capture_output=True)
        assert run.returncode == 0, run.stderr
        found.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert found[0] == found[1]


def test_what_nobody_changed_is_copied_by_the_kernel(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktmerge.merge.sinks import FileSink

    copied: list[str] = []
    whole = FileSink.copy

    def copy(self: FileSink, name: str, *rest: Any) -> None:
        copied.append(name)
        whole(self, name, *rest)

    monkeypatch.setattr(FileSink, "copy", copy)
    report = blend(parse_recipe(recipe(BLENDS["ties"]), "test", models), tmp_path / "out", device="cpu")
    assert copied == ["model.layers.0.mlp.down_proj.weight"]
    found = next(tensor for tensor in report.tensors if tensor.name == copied[0])
    base = load_file(models / "base" / "model.safetensors")[copied[0]]
    assert (found.changed, found.intended, found.kept) == (0, 0.0, dict.fromkeys(EXPERTS, 0))
    assert found.base == pytest.approx(float(base.double().square().sum()))
    assert load_file(tmp_path / "out" / "model.safetensors")[copied[0]].equal(base)
