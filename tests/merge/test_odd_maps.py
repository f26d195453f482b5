"""Regression and spectral methods on maps of odd shapes, which some experts left alone: the oracle's, map by map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_memory import Workbench
from merge_models import Tensors
from oracles_regression import DEFAULTS, common_then_specific, merge_map
from oracles_spectral import merge_matrix

CONFIG = {"model_type": "gpt2", "hidden_size": 6, "num_attention_heads": 2}
SHAPES: dict[str, tuple[int, ...]] = {
    "h.0.attn.c_attn.weight": (6, 18),
    "h.0.mlp.c_fc.weight": (6, 24),
    "h.0.mlp.c_proj.weight": (24, 6),
    "h.0.mlp.experts.gate_up_proj": (3, 8, 6),
    "h.0.one.weight": (1, 1),
    "h.0.row.weight": (1, 9),
    "h.0.column.weight": (9, 1),
    "h.0.ties.weight": (7, 11),
    "h.0.scalar": (),
    "h.0.empty.weight": (0, 4),
}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
MEASURED = [
    "regmean", "regmean_back", "diag_back", "cstar", "cts_guard", "nullspace", "fisher", "fisher_back", "cgm",
    "cgm_hard", "guarded", "model_tailor", "model_tailor_paper", "exact_patch",
]  # fmt: skip
ODD: dict[str, dict[str, Any]] = {
    "dg_hard": {"min_numel": 0, "scale": 0.4},
    "svd_truncate": {"rule": "fraction", "share": 0.4, "keep": "tail"},
    "star": {},
    "wiener": {"a": 0.4},
    "tsv_m": {},
    "iso_c": {},
    "soft_iso": {},
    "iso_cts": {"common": 0.4},
    "cart": {"fraction": 0.3},
    "resmerge": {"rank": 2},
    "knots": {},
    "task_arithmetic_svc": {},
    "tsv_m_svc": {},
    "swudi_a_svc": {"alpha": 0.2},
}
"""Options that matter on maps so small."""


def models() -> tuple[Tensors, dict[str, Tensors]]:
    generator = torch.Generator().manual_seed(11)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = {}
    for number, expert in enumerate(WEIGHTS):
        deltas = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        deltas["h.0.ties.weight"] = torch.randint(-1, 2, (7, 11), generator=generator) / 64
        frozen = list(SHAPES)[2 * number : 2 * number + 2]
        experts[expert] = {name: base[name] if name in frozen else base[name] + delta for name, delta in deltas.items()}
    experts["b"]["h.0.mlp.experts.gate_up_proj"] = base["h.0.mlp.experts.gate_up_proj"].clone()
    experts["b"]["h.0.mlp.experts.gate_up_proj"][2] += 0.1
    for expert in experts.values():
        expert["h.0.column.weight"] = base["h.0.column.weight"]
    return base, experts


def maps(name: str, values: torch.Tensor) -> list[np.ndarray]:
    """The linear maps in a tensor, outputs as rows."""
    array = values.double().numpy()
    if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
        return np.split(array.T, 3) if "c_attn" in name else [array.T]
    if "gate_up" in name:
        return [half for one in array for half in np.split(one, 2)]
    return [array]


def check(folder: Path, blend: dict[str, Any], rule: Any, weights: dict[str, float] = WEIGHTS) -> None:
    """``rule(deltas, base)`` for every map; means elsewhere."""
    base, experts = models()
    blended = Workbench(folder).blend(base, experts, {"lambda": 1.0, **blend}, weights=weights, config=CONFIG)
    for name in SHAPES:
        if not base[name].numel():
            continue
        deltas = [one[name] - base[name] for one in experts.values()]
        if base[name].dim() < 2:
            own = zip(weights.values(), deltas, strict=True)
            wanted = [sum(w * d.double().numpy() for w, d in own) / sum(weights.values())]
            found = [(blended[name] - base[name]).double().numpy()]
        else:
            found = maps(name, blended[name] - base[name])
            all_maps = zip(*(maps(name, delta) for delta in deltas), strict=True)
            wanted = [rule(list(one), start) for one, start in zip(all_maps, maps(name, base[name]), strict=True)]
        for one, expected in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, expected, rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("method", [*DEFAULTS, "cts"])
def test_every_map_is_merged_by_itself(tmp_path: Path, method: str) -> None:
    rule: Any = common_then_specific if method == "cts" else merge_map
    weights = list(WEIGHTS.values())
    check(tmp_path, {"method": method}, lambda own, start: rule(own, start, weights, **DEFAULTS.get(method, {})))


@pytest.mark.every(4)
@pytest.mark.parametrize("method", ODD)
def test_every_map_is_decomposed_by_itself(tmp_path: Path, method: str) -> None:
    weights, names = list(WEIGHTS.values()), list(WEIGHTS)

    def rule(own: list[np.ndarray], start: np.ndarray) -> np.ndarray:
        return merge_matrix(method, own, start, weights, names, 0, **ODD[method])

    check(tmp_path, {"method": method, **ODD[method]}, rule)


@pytest.mark.parametrize(
    "stages",
    [
        {"combine": "spectral_regmean", "transform": [{"trim": {"density": 0.5}}]},
        {"combine": "mean", "guard": ["nullspace", {"cstar": {"covariance": "weights"}}]},
        {"combine": "regmean"},
    ],
    ids=["combine", "guards", "measured"],
)
def test_spelled_out_stages_for_maps_leave_other_tensors_to_the_rest(tmp_path: Path, stages: dict[str, Any]) -> None:
    base, experts = models()
    bench = Workbench(tmp_path)
    blended = bench.blend(base, experts, {"stages": stages}, weights=WEIGHTS, config=CONFIG)
    without = {"combine": "mean", **{kind: stages[kind] for kind in ("transform",) if kind in stages}}
    plain = bench.blend(base, experts, {"stages": without}, weights=WEIGHTS, config=CONFIG)
    assert blended["h.0.scalar"].equal(plain["h.0.scalar"])
    assert not blended["h.0.ties.weight"].equal(plain["h.0.ties.weight"])


@pytest.mark.every(3)
@pytest.mark.parametrize("method", MEASURED)
def test_measured_methods_take_maps_of_any_shape(tmp_path: Path, method: str) -> None:
    base, experts = models()
    blended = Workbench(tmp_path).blend(
        base, experts, {"method": method, "lambda": 1.0}, weights=WEIGHTS, config=CONFIG
    )
    for name, values in blended.items():
        assert values.isfinite().all(), name
        assert values.shape == SHAPES[name]
    assert blended["h.0.column.weight"].equal(base["h.0.column.weight"])
