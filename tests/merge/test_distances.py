"""Distances from the base against an oracle that walks the numbers of each type: ulps exact, quantiles by sorting."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import write

from ktmerge.errors import KtmergeError
from ktmerge.merge import inspect
from ktmerge.merge.diagnostics import survey
from ktmerge.merge.diagnostics.inspection import Inspection
from ktmerge.merge.diagnostics.kinds import kind_of
from ktmerge.merge.diagnostics.measures import Spread
from ktmerge.merge.kernels.bins import BINS, lower_edge

NAME = "model.layers.0.mlp.up_proj.weight"
CODES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def ulp(values: torch.Tensor) -> torch.Tensor:
    """The distance to the next larger magnitude, found by counting the bit pattern up: fp64."""
    magnitude = values.abs()
    above = (magnitude.view(CODES[values.dtype]) + 1).view(values.dtype)
    top = torch.tensor(torch.finfo(values.dtype).max, dtype=values.dtype)
    below = (top.view(CODES[values.dtype]) - 1).view(values.dtype)
    last = top.double() - below.double()  # beyond the largest number there is none
    return torch.where(magnitude == top, last, above.double() - magnitude.double())


def steps(base: torch.Tensor, tuned: torch.Tensor) -> np.ndarray[Any, Any]:
    return ((tuned.double() - base.double()).abs() / ulp(base)).numpy()


def hold(folder: Path, base: torch.Tensor, *tuned: torch.Tensor) -> Inspection:
    """Inspect fine-tunes of a model of one tensor; they are called 0, 1, ..."""
    write(folder / "base", {NAME: base})
    for number, values in enumerate(tuned):
        write(folder / str(number), {NAME: values})
    return inspect(folder / "base", {str(number): folder / str(number) for number in range(len(tuned))})


def patterns(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Random finite numbers of a type by their bits: normal and subnormal, of all sizes, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    width = 16 if CODES[dtype] == torch.int16 else 32
    bits = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (count,), generator=generator)
    values = bits.to(CODES[dtype]).view(dtype)
    values = torch.where(values.isfinite(), values, torch.zeros((), dtype=dtype))
    tiny = (bits % 128).to(CODES[dtype]).view(dtype)
    return torch.cat([values, tiny, torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).max], dtype=dtype)])


@pytest.mark.parametrize("dtype", CODES)
def test_ulps_are_exact_for_every_kind_of_number(tmp_path: Path, dtype: torch.dtype) -> None:
    """Up and down by some steps, and to any other number; each value must be in its bin."""
    base, other = patterns(dtype, 20_000, 1), patterns(dtype, 20_000, 2)
    stepped = (base.view(CODES[dtype]) + (torch.arange(len(base)) % 600 - 300).to(CODES[dtype])).view(dtype)
    stepped = torch.where(stepped.isfinite(), stepped, base)
    found = hold(tmp_path, base, stepped, other)
    edges = np.array([lower_edge(place) for place in range(2, BINS)])
    for number, tuned in enumerate((stepped, other)):
        spread, expected = found.spread(str(number), "llm.layers"), steps(base, tuned)
        assert spread is not None
        assert spread.largest == expected.max()
        places = np.where(expected == 0, 0, 1 + np.searchsorted(edges, expected, "right"))
        assert (spread.histogram == np.bincount(places, minlength=BINS)).all()


def test_whole_numbers_below_256_have_bins_of_their_own() -> None:
    edges = [lower_edge(place) for place in range(BINS)]
    assert set(range(256)) <= set(edges)
    assert all(after - before <= before / 128 for before, after in pairwise(edges[2:]))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 3.0])
def test_quantiles_equal_sorting(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    base = (0.05 * torch.randn(30_011, generator=generator)).to(dtype)
    moved = (base.float() * (1 + scale * torch.randn(len(base), generator=generator))).to(dtype)
    spread = hold(tmp_path, base, moved).spread("0", "llm.layers")
    assert spread is not None
    expected = np.sort(steps(base, moved))
    assert spread.largest == expected[-1]
    for share in (0.001, 0.25, 0.5, 0.9, 0.99, 1.0):
        value = expected[math.ceil(share * len(expected)) - 1]
        found = spread.quantile(share)
        assert found == value if value < 256 and value == int(value) else value * (1 - 2**-7) < found <= value
    changed = expected[expected > 0]
    below = (changed < 0.5).mean() if changed.size else 0.0
    assert spread.below(0.5) == pytest.approx(below, abs=1e-12)


def test_sums_signs_and_shares_equal_fp64_whatever_the_pieces_and_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    base = (0.05 * torch.randn(7, 1001, generator=generator)).to(torch.bfloat16)
    tuned = [base.float() + 3e-4 * torch.randn(base.shape, generator=generator) for _ in range(3)]
    tuned = [one.to(dtype) for one, dtype in zip(tuned, (torch.bfloat16, torch.float32, torch.float16), strict=True)]
    tuned[1][3:] = base[3:].float()  # some of it stays as it was
    found = hold(tmp_path / "whole", base, *tuned)
    monkeypatch.setattr(survey, "PIECE", 997)
    pieces = hold(tmp_path / "pieces", base, *tuned)
    theta = base.double()
    deltas = [one.double() - theta for one in tuned]
    for one in (found, pieces):
        for number, delta in enumerate(deltas):
            moved = one.movement(str(number), "llm.layers[0]", "up")
            assert moved is not None
            assert moved.relative == pytest.approx(float(delta.norm() / theta.norm()), rel=1e-12)
            assert moved.changed == int((delta != 0).sum())
            assert moved.elements == theta.numel()
            likeness = torch.cosine_similarity(theta.view(-1), (theta + delta).view(-1), 0)
            assert moved.likeness == pytest.approx(float(likeness), rel=1e-9)
        for a, b in combinations(range(3), 2):
            pair = one.pair(str(a), str(b), "llm.layers")
            assert pair is not None
            expected = torch.cosine_similarity(deltas[a].view(-1), deltas[b].view(-1), 0)
            assert pair.cosine == pytest.approx(float(expected), abs=1e-12)
            both = (deltas[a] != 0) & (deltas[b] != 0)
            assert pair.both == int(both.sum())
            assert pair.opposed == int((deltas[a].sign() * deltas[b].sign() < 0).sum())
    assert all(
        (found.spreads[name][layer].histogram == pieces.spreads[name][layer].histogram).all()
        for name in "012"
        for layer in found.layers
    )


def test_fp64_is_measured_in_fp64(tmp_path: Path) -> None:
    base = torch.linspace(1, 2, 1000, dtype=torch.float64)[:-1]
    found = hold(tmp_path, base, base + 3 * 2.0**-52)
    spread, moved = found.spread("0", "llm.layers"), found.movement("0", "llm.layers")
    assert spread is not None
    assert moved is not None
    assert spread.largest == spread.quantile(0.5) == 3
    assert moved.share == 1


def test_the_bytes_decide_the_sums_not_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(300_000, generator=generator)
    monkeypatch.setattr(survey, "PIECE", 10_000)
    first = hold(tmp_path / "a", base, base + 1e-3 * torch.randn(base.shape, generator=generator))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    again = inspect(tmp_path / "a/base", {"0": tmp_path / "a/0"})
    assert again.to_json() == first.to_json()
    assert again.movements == first.movements


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to look at a peak of its own")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from ktmerge.merge import inspect
folder = Path(sys.argv[1])
inspect(folder / "base", {"x": folder / "x", "y": folder / "y"})
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], "torch" in sys.modules)
"""
    peaks = []
    for millions in (2, 10):
        folder = tmp_path / str(millions)
        base = torch.randn(millions << 20, dtype=torch.float32).to(torch.bfloat16)
        for name in ("base", "x", "y"):
            write(folder / name, {NAME: base + (name != "base")})
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
        peak, loaded = done.stdout.split()
        assert loaded == "False"
        peaks.append(int(peak) / 1024)
    assert peaks[1] - peaks[0] < 20, "MB; the larger model has 48 MB more"


def test_a_file_that_changes_meanwhile_is_found_out(tmp_path: Path) -> None:
    hold(tmp_path, torch.ones(2000), torch.ones(2000))

    class Meddler:
        def note(self, text: str) -> None: ...

        @contextmanager
        def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Any]:
            yield self

        def advance(self, amount: float = 1) -> None:
            os.utime(tmp_path / "0/model.safetensors", (1, 1))

    with pytest.raises(KtmergeError, match=r"0/model\.safetensors: was changed while it was in use"):
        inspect(tmp_path / "base", {"0": tmp_path / "0"}, progress=Meddler())


def test_what_is_not_finite_is_counted_named_and_left_out(tmp_path: Path) -> None:
    base = torch.ones(5000)
    base[17] = torch.inf
    tuned = base + 2.0**-23
    tuned[[3, 4000]] = torch.nan
    found = hold(tmp_path, base, tuned)
    moved = found.movement("0", "llm.layers")
    assert moved is not None
    assert moved.changed == 4997
    assert math.isfinite(moved.relative)
    assert found.broken == {("", NAME): 1, ("0", NAME): 3}
    said = "\n".join(found.warnings)
    assert f"the base: 1 values of '{NAME}' are NaN or infinite" in said
    assert f"0: 3 values of '{NAME}'" in said


@given(st.integers(0, BINS - 1))
@settings(max_examples=60, deadline=None)
def test_edges_grow_and_a_quantile_is_an_edge(place: int) -> None:
    histogram = np.zeros(BINS, np.int64)
    histogram[place] = 3
    assert Spread(histogram).quantile(0.5) == lower_edge(place)
    assert place < 2 or lower_edge(place) > lower_edge(place - 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "q"),
        ("model.layers.0.self_attn.q_proj.bias", "q"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "qkv"),
        ("visual.blocks.3.attn.qkv.weight", "qkv"),
        ("visual.blocks.3.attn.proj.weight", "o"),
        ("visual.blocks.3.norm1.weight", "norm"),
        ("h.0.attn.c_attn.weight", "qkv"),
        ("h.0.attn.c_proj.weight", "o"),
        ("h.0.mlp.c_fc.weight", "up"),
        ("h.0.mlp.c_proj.weight", "down"),
        ("h.0.ln_1.weight", "norm"),
        ("model.layers.0.mlp.gate_proj.weight", "gate"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate_up_proj.weight", "up"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "down"),
        ("model.layers.0.mlp.experts.down_proj", "down"),
        ("model.layers.0.mlp.experts.gate_up_proj", "up"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", "up"),
        ("model.layers.0.mlp.experts.down_proj_bias", "down"),
        ("model.layers.0.self_attn.sinks", "other"),
        ("model.encoder.layers.0.self_attn.projection.weight", "o"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.experts.1.w1.weight", "gate"),
        ("model.layers.0.block_sparse_moe.experts.1.w2.weight", "down"),
        ("model.layers.0.block_sparse_moe.experts.1.w3.weight", "up"),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight", "o"),
        ("vision_tower.vision_model.encoder.layers.0.layer_norm1.bias", "norm"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "up"),
        ("encoder.layer.0.attention.self.query.weight", "q"),
        ("encoder.layer.0.attention.output.dense.weight", "o"),
        ("encoder.layer.0.intermediate.dense.weight", "up"),
        ("encoder.layer.0.output.dense.weight", "down"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "q"),
        ("encoder.block.0.layer.0.SelfAttention.o.weight", "o"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "up"),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", "down"),
        ("encoder.block.0.layer.0.layer_norm.weight", "norm"),
        ("model.layers.0.attention.wo.weight", "o"),
        ("language_model.model.layers.0.attention.wqkv.weight", "qkv"),
        ("language_model.model.layers.0.feed_forward.w2.weight", "down"),
        ("language_model.model.layers.0.attention_norm.weight", "norm"),
        ("vision_model.encoder.layers.0.ls1", "other"),
        ("model.decoder.layers.0.encoder_attn.k_proj.weight", "k"),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", "qkv"),
        ("model.layers.0.linear_attn.A_log", "other"),
    ],
)
def test_kinds_by_the_names_of_many_families(name: str, kind: str) -> None:
    assert kind_of(name) == kind
