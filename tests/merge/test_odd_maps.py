"""Methods for linear maps, measured ones among them, on maps of odd shapes, which some experts left alone.

From files to files, each map against the float64 computation of the formula.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured_oracles import (
    Map,
    analytic_q,
    cstar,
    cts_guard,
    dropped,
    elect_base,
    exact_patch,
    informed,
    nullspace,
    regmean,
    regmean_back,
    tailored,
    union,
)
from merge_memory import Workbench
from merge_models import Tensors
from merge_oracles import assert_rounded, elect, trim_all
from merge_statistics import NORM, TOKENS, random
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
    "h.0.attn.c_proj.weight": (6, 6),
    "h.0.norm.weight": (6,),
    "wte.weight": (5, 6),
    "patch.conv.weight": (2, 3, 2, 2),
}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
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
    "knots": {"density": 0.5},  # no part of coordinates that are as large as one another
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


def is_map(name: str) -> bool:
    return len(SHAPES[name]) > 1 and name not in ("wte.weight", "patch.conv.weight")


def maps(name: str, values: torch.Tensor | np.ndarray) -> list[np.ndarray]:
    """The linear maps in a tensor, outputs as rows; the whole of any other."""
    array = np.array(values.double() if isinstance(values, torch.Tensor) else values)
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
        if not is_map(name):
            own = zip(weights.values(), deltas, strict=True)
            wanted = [sum(w * d.double().numpy() for w, d in own) / sum(weights.values())]
            found = [(blended[name] - base[name]).double().numpy()]
        else:
            found = maps(name, blended[name] - base[name])
            all_maps = zip(*(maps(name, delta) for delta in deltas), strict=True)
            wanted = [rule(list(one), start) for one, start in zip(all_maps, maps(name, base[name]), strict=True)]
        for one, expected in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, expected, rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.every(3)
@pytest.mark.parametrize("method", [*DEFAULTS, "cts"])
def test_every_map_is_merged_by_itself(tmp_path: Path, method: str) -> None:
    rule: Any = common_then_specific if method == "cts" else merge_map
    weights = list(WEIGHTS.values())
    check(tmp_path, {"method": method}, lambda own, start: rule(own, start, weights, **DEFAULTS.get(method, {})))


@pytest.mark.every(7)
@pytest.mark.parametrize("method", ODD)
def test_every_map_is_decomposed_by_itself(tmp_path: Path, method: str) -> None:
    weights, names = list(WEIGHTS.values()), list(WEIGHTS)

    def rule(own: list[np.ndarray], start: np.ndarray) -> np.ndarray:
        return merge_matrix(method, own, start, weights, names, 0, **ODD[method])

    check(tmp_path, {"method": method, **ODD[method]}, rule)


@pytest.mark.every(2)
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


# --- measured methods -------------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any]]] = [
    ("ties_base", {}),
    ("ties_base", {"density": 0.9, "kappa": 0.3}),
    ("diag_back", {}),
    ("diag_back", {"a": 0.8, "ridge": 0.05}),
    ("regmean_back", {}),
    ("regmean_back", {"a": 0.2, "eta": 0.5, "prior_u": 0.3, "prior_d": 0.01}),
    ("regmean", {}),
    ("regmean", {"base_weight": 0.5, "normalise": "trace", "eta": 0.4}),
    ("regmean", {"vectors": True, "base_weight": 0.2}),
    ("cstar", {}),
    ("cstar", {"granularity": "row", "a": 0.3}),
    ("cstar", {"granularity": "head", "head_size": 3}),
    ("cstar", {"covariance": "weights", "a": 0.7}),
    ("cts_guard", {}),
    ("cts_guard", {"residual": "sum", "kappa": 3.0, "a": 0.8, "mu": 0.5}),
    ("cts_guard", {"residual": "wudi_cf", "mode": "hard", "energy": 0.6, "granularity": "row"}),
    ("nullspace", {}),
    ("nullspace", {"mode": "hard", "energy": 0.7}),
    ("model_tailor", {}),
    ("model_tailor", {"score": "delta_obs", "decoration": "exact", "density": 0.3, "block": 4}),
    ("model_tailor", {"score": "up_aware", "decoration": "scalar", "density": 0.5, "block": 5}),
    ("model_tailor_paper", {}),
    ("model_tailor_paper", {"density": 0.4, "block": 8, "damp": 0.1}),  # no block of two columns: their scores all tie
    ("exact_patch", {"density": 0.35}),
    ("exact_patch", {"density": 0.5, "kappa": 0.7, "support": "shared"}),
    ("dare", {"density": 0.4, "rescale": "q", "q": "analytic"}),
    ("fisher", {}),
    ("fisher", {"base_weight": 0.3, "norm": "none", "floor": 0.01}),
    ("fisher_back", {"a": 0.3}),
    ("cgm", {}),
    ("cgm", {"alpha": 2.0, "norm": "global"}),
    ("cgm_hard", {"alpha": 1.5}),
    ("cgm_hard", {"alpha": 1.5, "density": 0.3}),
    ("guarded", {"kappa": 0.1}),
]
TRUSTING = ("regmean_back", "diag_back", "cstar", "cts_guard")
PAPERS = {"score": "paper", "decoration": "paper"}


def sampled(name: str, owner: str) -> list[np.ndarray]:
    """Inputs of every map in a tensor, as measured in a model."""
    shape = SHAPES[name]
    wide = shape[-2] if ".c_" in name else shape[-1]
    found = random(f"inputs {owner} {name}", (*shape[:-2], TOKENS, wide)).double().numpy()
    return [one for one in found for _ in range(2)] if found.ndim > 2 else [found] * 3


def patched(method: str, m: Map, **p: Any) -> np.ndarray:
    if method == "exact_patch":
        return union([exact_patch(m, t, **p) for t in range(3)], m.weights)
    p = {**PAPERS, **p} if method == "model_tailor_paper" else p
    return union([tailored(m, t, **p) for t in range(3)], m.weights)


RULES: dict[str, Any] = {
    "regmean": regmean,
    "regmean_back": regmean_back,
    "diag_back": lambda m, **p: regmean_back(m, eta=0.0, **p),
    "cstar": lambda m, **p: cstar(m, m.mean, **p),
    "cts_guard": cts_guard,
    "nullspace": lambda m, **p: nullspace(m.mean, m.up, **p),
}


def merged(method: str, name: str, base: Tensors, experts: dict[str, Tensors], **p: Any) -> list[np.ndarray]:
    """The merged delta of every map in a tensor, or of the whole tensor if it is of another class."""
    weights, names = list(WEIGHTS.values()), list(WEIGHTS)
    shares = np.array(weights) / sum(weights)
    deltas = [(one[name].float() - base[name].float()).double().numpy() for one in experts.values()]
    if method in ("fisher", "fisher_back", "cgm", "cgm_hard", "guarded"):
        up, *down = (random(f"fisher {owner} {name}", SHAPES[name]).double().numpy() for owner in ("base", *names))
        return maps(name, informed(method, deltas, weights, up, down, NORM, **p))
    if method == "ties_base":
        trimmed = [
            trim_all({name: d}, p.get("density", 0.2), "tensor", e, 0)[name] for d, e in zip(deltas, names, strict=True)
        ]
        if not is_map(name):
            return [elect(trimmed, weights, "weighted", "wmean", 0.0)]
        own = zip(*(maps(name, one) for one in trimmed), strict=True)
        return [elect_base(list(one), x, weights, **p) for one, x in zip(own, sampled(name, "base"), strict=False)]
    if not is_map(name):
        mean = sum(share * delta for share, delta in zip(shares, deltas, strict=True))
        if p.get("vectors") and "norm" in name:
            up, *down = (
                random(f"fisher scales {owner} {name}", SHAPES[name]).double().numpy() for owner in ("base", *names)
            )
            felt = [3 * share * square for share, square in zip(shares, down, strict=True)]
            wanted = sum(one * delta for one, delta in zip(felt, deltas, strict=True))
            return [wanted / (sum(felt) + p["base_weight"] * up)]
        return [mean * sum(weights) if method == "dare" else mean * (p.get("a", 0.5) if method in TRUSTING else 1.0)]
    up, down = sampled(name, "base"), [sampled(name, one) for one in names]
    parts = zip(maps(name, base[name]), *(maps(name, delta) for delta in deltas), strict=True)
    kind = "qkv" if "c_attn" in name else "o" if "attn.c_proj" in name else ""
    whole = [
        Map(start, list(own), weights, up[n], [x[n] for x in down], (0, names, f"{name}#{n}"), kind)
        for n, (start, *own) in enumerate(parts)
    ]
    if method == "dare":
        q = [analytic_q(whole, t, p["density"]) for t in range(3)]
        made = [dropped(d, p["density"], q[t], names[t], name, 0) for t, d in enumerate(deltas)]
        return maps(name, sum(weight * one for weight, one in zip(weights, made, strict=True)))
    rule = RULES.get(method, lambda m, **p: patched(method, m, **p))
    return [rule(m, **p) for m in whole]


@pytest.mark.every(20)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_measured_methods_are_their_formulas(
    tmp_path: Path, method: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    base, experts = models()
    base = {name: values.to(dtype) for name, values in base.items()}
    experts = {expert: {name: one.to(dtype) for name, one in tensors.items()} for expert, tensors in experts.items()}
    blend = {"method": method, "lambda": 1.0, **parameters}
    blended = Workbench(tmp_path).blend(base, experts, blend, weights=WEIGHTS, config=CONFIG, seed=0)
    for name in SHAPES:
        if not base[name].numel():
            continue
        wanted = merged(method, name, base, experts, **parameters)
        found, starts = (maps(name, one[name]) for one in (blended, base))
        assert len(found) == len(wanted)
        for stored, start, delta in zip(found, starts, wanted, strict=True):
            scale = abs(start) + abs(delta) + 40 * abs(delta).max()
            assert_rounded(torch.from_numpy(stored.copy()).to(dtype), start + delta, scale, name)
        if all(one[name].equal(base[name]) for one in experts.values()):
            assert blended[name].equal(base[name])


def test_experts_that_read_different_inputs_add_up_through_the_guard(tmp_path: Path) -> None:
    """E-1: without a guard and with all trust, the sum; of one expert, and of equal ones, the one."""
    name, generator = "h.0.some.weight", torch.Generator().manual_seed(3)
    base = {name: torch.zeros(7, 12)}
    frame = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    deltas = [torch.randn(7, 4, generator=generator) @ frame[4 * t : 4 * t + 4] for t in range(3)]
    free = {"method": "cts_guard", "residual": "sum", "kappa": 0.0, "a": 1.0, "covariance": "weights"}
    bench = Workbench(tmp_path)
    added = bench.blend(base, {e: {name: d} for e, d in zip("abc", deltas, strict=True)}, free)
    torch.testing.assert_close(added[name], deltas[0] + deltas[1] + deltas[2], rtol=0, atol=2e-5)
    for experts in ("a", "abc"):
        same = bench.blend(base, {key: {name: deltas[0]} for key in experts}, free)
        torch.testing.assert_close(same[name], deltas[0], rtol=0, atol=2e-5)
