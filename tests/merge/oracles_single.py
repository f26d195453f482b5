"""Methods that work element by element or tensor by tensor on one tuned model, in float64 numpy, from their formulas.

Nothing here imports ktmerge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil, floor
from typing import Any

import numpy as np
from merge_oracles import Arrays, dare_one, draws, elect, splitmix, stream_key

EVEN = {"a": 1.0, "b": 1.0, "c": 1.0}
UNEVEN = {"a": 0.5, "b": 2.0, "c": 1.0}
ONE = {"a": 1.0}

CASES: list[tuple[str, dict[str, Any], dict[str, float], float]] = [
    ("lines", {}, ONE, 1.0),
    ("lines", {"alpha": 0.3, "beta": 0.9, "outside": "alpha+beta"}, {"b": 1.0}, 0.8),
    ("lines", {"alpha": "auto", "beta": 0.4}, EVEN, 1.0),
    ("expo", {}, ONE, 1.2),
    ("breadcrumbs", {}, EVEN, 0.3),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1, "scope": "row"}, {"a": 1.0, "b": -0.5}, 1.0),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.05, "scope": "global"}, {"c": 1.0}, 1.0),
    ("breadcrumbs", {"density": 0.8, "gamma": 0.5}, ONE, 1.0),
    ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.04}, UNEVEN, 0.9),
    ("della", {}, EVEN, 1.1),
    ("della", {"density": 0.7, "epsilon": 0.25, "rescale": "none"}, UNEVEN, 1.0),
    ("della_linear", {}, {"a": 1.0, "b": -0.5}, 1.0),
    ("della_linear", {"density": 0.3, "epsilon": 0.15, "rescale": "scalar"}, ONE, 1.0),
    ("clip", {}, ONE, 1.0),
    ("clip", {"rho": 0.02}, {"a": 1.0, "b": 3.0}, 0.9),
    ("clip", {"cap": "spectral", "rho": 0.02}, ONE, 1.0),
    ("clip", {"cap": "quantile", "quantile": 0.6}, EVEN, 1.0),
    ("nearswap", {}, ONE, 1.0),
    ("nearswap", {"t": 3e-3}, UNEVEN, 0.5),
    ("half_reset", {}, ONE, 1.0),
    ("half_reset", {"others": "expert"}, {"b": 1.0}, 0.9),
    ("half_reset", {"mode": "element"}, {"c": 1.0}, 1.0),
    ("spider", {}, ONE, 1.0),
    ("spider", {"kappa": 0.1}, {"b": 1.0}, 0.7),
    ("neuron_fusion", {}, ONE, 1.0),
    ("neuron_fusion", {"rho": 0.5, "gamma": 0.2, "alpha": 0.8, "head_size": 2}, {"b": 1.0}, 1.0),
    ("soup", {}, UNEVEN, 1.0),
    ("soup", {"base_weight": 1.0}, EVEN, 1.0),
    ("ema", {}, EVEN, 1.0),
    ("ema", {"beta": 0.5}, UNEVEN, 0.8),
    ("bands", {}, ONE, 1.0),
    ("bands", {"coefficients": [1.0, 0.0, -0.5], "scope": "global"}, {"a": 1.0, "b": 2.0}, 0.5),
    ("bitdelta", {}, ONE, 1.0),
    ("arcee_fusion", {}, ONE, 1.0),
    ("arcee_fusion", {"k": 0.2}, {"b": 1.0}, 0.8),
]

PLAIN = {
    "breadcrumbs": ("vector",),
    "della": ("vector", "embed", "conv"),
    "dare": ("vector", "embed", "conv"),
    "bands": ("vector",),
    "bitdelta": ("vector", "embed"),
    "neuron_fusion": ("vector", "embed", "conv"),
}
"""Classes of tensors whose deltas a method leaves as they are."""


def ranks(values: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Rank of each magnitude, 0 the smallest; equal ones by the hash."""
    found = np.empty(values.size, np.int64)
    found[np.lexsort((hashes.reshape(-1), np.abs(values.reshape(-1))))] = np.arange(values.size)
    return found.reshape(values.shape)


def row_view(values: np.ndarray, kind: str) -> np.ndarray:
    """The tensor with what belongs to one output as a row."""
    if values.ndim < 2:
        return values.reshape(1, -1)
    return values.reshape(values.shape[0], -1) if kind == "conv" else values.reshape(-1, values.shape[-1])


def banded(deltas: Arrays, classes: Mapping[str, str], scope: str, expert: str, seed: int, purpose: str) -> Arrays:
    """(rank, number of elements) of every element among those it competes with, as two stacked arrays."""
    hashed = {
        name: splitmix(stream_key(seed, purpose, expert, name), delta.size).reshape(delta.shape)
        for name, delta in deltas.items()
    }
    found = {}
    if scope == "global":
        flat = np.concatenate([delta.reshape(-1) for delta in deltas.values()])
        order = ranks(flat, np.concatenate([hashed[name].reshape(-1) for name in deltas]))
        start = 0
        for name, delta in deltas.items():
            own = order[start : start + delta.size].reshape(delta.shape)
            found[name] = np.stack([own, np.full(delta.shape, flat.size)])
            start += delta.size
        return found
    for name, delta in deltas.items():
        if scope == "row":
            rows, keys = row_view(delta, classes[name]), row_view(hashed[name], classes[name])
            own = np.stack([ranks(row, key) for row, key in zip(rows, keys, strict=True)]).reshape(delta.shape)
            number = rows.shape[1]
        else:
            own, number = ranks(delta, hashed[name]), delta.size
        found[name] = np.stack([own, np.full(delta.shape, number)])
    return found


def crumbs(delta: np.ndarray, place: np.ndarray, density: float, gamma: float) -> np.ndarray:
    rank, number = place
    n = int(number.flat[0])
    kept = floor(density * n)
    outliers = min(floor(gamma * n), n - kept)
    return np.where((rank < n - outliers) & (rank >= n - outliers - kept), delta, 0.0)


def magprune(delta: np.ndarray, kind: str, expert: str, name: str, seed: int, **p: Any) -> np.ndarray:
    place = banded({name: delta}, {name: kind}, "row", expert, seed, "magprune")[name]
    last = place[1] - 1
    r = np.where(last > 0, place[0] / np.maximum(last, 1), 0.5)
    density, epsilon = p.get("density", 0.5), p.get("epsilon", 0.1)
    chance = density - epsilon + 2 * epsilon * r
    drawn = draws(stream_key(seed, "dare", expert, name), delta.size).reshape(delta.shape)
    kept = np.where(drawn < np.round(chance * 2.0**32), delta, 0.0)
    rescale = p.get("rescale", "elementwise")
    if rescale == "elementwise":
        return kept / chance
    return kept * (abs(delta).sum() / abs(kept).sum()) if rescale == "scalar" and kept.any() else kept


def clip(merged: np.ndarray, base: np.ndarray, kind: str, cap: str = "norm", **p: Any) -> np.ndarray:
    if cap == "quantile":
        limit = np.sort(abs(merged).reshape(-1))[ceil(round(p["quantile"] * merged.size, 6)) - 1]
        return np.clip(merged, -limit, limit)
    rho = p.get("rho", 0.05)
    if cap == "spectral" and kind == "matrix":
        u, s, vt = np.linalg.svd(merged, full_matrices=False)
        return (u * np.minimum(s, rho * np.linalg.norm(base, 2))) @ vt
    size = np.linalg.norm(merged)
    return merged * min(1.0, rho * np.linalg.norm(base) / size) if size else merged


PROJECTIONS = {"q_proj": "q", "k_proj": "k", "up_proj": "up", "down_proj": "down", "fc1": "up"}


def projection(name: str) -> tuple[str, str] | None:
    """The module and the kind of a projection."""
    parts = name.split(".")
    return (".".join(parts[:-2]), PROJECTIONS[parts[-2]]) if len(parts) > 1 and parts[-2] in PROJECTIONS else None


def half(name: str, seed: int, others: str = "base") -> float:
    """1 if the tensor stays the expert's."""
    found = projection(name)
    if found is None:
        return float(others == "expert")
    module, kind = found
    if kind in "qkvo":
        members, count = ["q", "k", "v", "o"], 2
    elif ".fc1." in name:
        members, count = ["up", "down"], 1
    else:
        layer = int(re.findall(r"\d+", module)[-1])
        members, count = ["gate", "up", "down"], 1 + (layer + stream_key(seed, "half_reset", "", "")) % 2
    return float(kind in sorted(members, key=lambda one: stream_key(seed, "half_reset", one, module))[:count])


def spider(delta: np.ndarray, base: np.ndarray, kappa: float = 0.0) -> np.ndarray:
    def importance(values: np.ndarray) -> np.ndarray:
        size = abs(values)
        return 1 / (1 + np.exp(-(size - size.mean()) / size.std())) if size.std() > 0 else np.full(values.shape, 0.5)

    before, after = importance(base), importance(delta)
    c = np.where(after > before + kappa, after / (before + after), 0.0)
    return np.minimum(c / c[c > 0].mean(), 1) * delta if (c > 0).any() else 0 * delta


def neuron_fusion(
    deltas: Arrays, classes: Mapping[str, str], rho: float = 0.3, gamma: float = 0.1, alpha: float = 1.0,
    head_size: int | None = None,
) -> Arrays:  # fmt: skip
    """Groups of up and down, and of the heads of q and k: the models have no v and o, and fewer keys than queries."""
    modules: dict[str, dict[str, str]] = {}
    for name in deltas:
        found = projection(name)
        if found and classes[name] == "matrix":
            modules.setdefault(found[0], {})[found[1]] = name
    merged = dict(deltas)
    for members in modules.values():
        axes = {kind: 1 if kind == "down" else 0 for kind in members}
        energies = {kind: (deltas[name] ** 2).sum(1 - axes[kind]) for kind, name in members.items()}
        sizes = {one.size for one in energies.values()}
        count = min(sizes)
        if "q" in members and head_size:
            count = min(sizes) // head_size
        elif len(sizes) > 1:
            continue
        scores = sum(one.reshape(count, -1).sum(1) for one in energies.values())
        kept = np.zeros(count, bool)
        kept[np.argsort(-scores)[: ceil(round(rho * count, 6))]] = True
        rest = gamma**2 * scores[~kept].sum()
        factor = np.where(kept, np.sqrt((alpha**2 * scores.sum() - rest) / scores[kept].sum()), gamma)
        for kind, name in members.items():
            own = np.repeat(factor, energies[kind].size // count)
            merged[name] = deltas[name] * (own if axes[kind] else own[:, None])
    return merged


def ramp(names: list[str], alpha: float, beta: float, outside: float) -> dict[str, float]:
    found = {name: re.search(r"^(.*)\.layers\.(\d+)\.", name) for name in names}
    depth: dict[str, int] = {}
    for match in found.values():
        if match:
            depth[match[1]] = max(depth.get(match[1], 0), int(match[2]))
    return {name: alpha + beta * int(match[2]) / depth[match[1]] if match else outside for name, match in found.items()}


def transformed(
    method: str, base: Arrays, deltas: Arrays, expert: str, seed: int, classes: Mapping[str, str], **p: Any
) -> Arrays:
    """Every delta of one expert as the method makes it before they are added."""
    family = method.removesuffix("_ties").removesuffix("_linear")
    proper = {name: delta for name, delta in deltas.items() if classes[name] not in PLAIN.get(family, ())}
    changed: Arrays = {}
    if family in ("breadcrumbs", "trim", "ties"):
        places = banded(proper, classes, p.get("scope", "tensor"), expert, seed, "trim")
        gamma = p.get("gamma", 0.01) if family == "breadcrumbs" else 0.0
        changed = {name: crumbs(delta, places[name], p.get("density", 0.2), gamma) for name, delta in proper.items()}
    elif family == "della":
        changed = {name: magprune(delta, classes[name], expert, name, seed, **p) for name, delta in proper.items()}
    elif family == "dare":
        kept = {name: dare_one(one, p["density"], "none", expert, name, seed) for name, one in proper.items()}
        changed = {name: one / p["q"] for name, one in kept.items()}
    elif family == "bands":
        coefficients = np.array(p.get("coefficients", [0.0, 0.25, 0.5, 0.75, 1.0]))
        for name, (rank, number) in banded(proper, classes, p.get("scope", "tensor"), expert, seed, "trim").items():
            n, m = int(number.flat[0]), coefficients.size
            edges = np.array([band * n // m for band in range(1, m)])
            changed[name] = coefficients[np.searchsorted(edges, rank, side="right")] * proper[name]
    elif family == "bitdelta":
        changed = {name: abs(delta).mean() * np.sign(delta) for name, delta in proper.items()}
    elif family == "spider":
        changed = {name: spider(delta, base[name], **p) for name, delta in proper.items()}
    elif family == "neuron_fusion":
        changed = neuron_fusion(proper, classes, **p)
    elif family == "half_reset" and p.get("mode") == "element":
        changed = {name: dare_one(delta, 0.5, "none", expert, name, seed) for name, delta in proper.items()}
    elif family == "half_reset":
        changed = {name: half(name, seed, **p) * delta for name, delta in proper.items()}
    elif family == "arcee_fusion":
        for name, delta in proper.items():
            rows = row_view(delta, classes[name])
            score = abs(rows) * np.linalg.norm(rows, axis=1, keepdims=True)
            ordered = np.sort(score.reshape(-1))
            low, middle, high = (ordered[max(0, ceil(share * ordered.size) - 1)] for share in (0.25, 0.5, 0.75))
            changed[name] = np.where(score >= middle + p.get("k", 1.5) * (high - low), rows, 0.0).reshape(delta.shape)
    return {**deltas, **changed}


def merged_deltas(
    method: str, base: Arrays, deltas: Mapping[str, Arrays], weights: Mapping[str, float], seed: int,
    classes: Mapping[str, str], **p: Any,
) -> tuple[Arrays, float]:  # fmt: skip
    experts = sorted(deltas)
    w = np.array([weights[expert] for expert in experts])
    own = [transformed(method, base, deltas[expert], expert, seed, classes, **p) for expert in experts]
    stacks = {name: np.stack([one[name] for one in own]) for name in base}
    if method in ("della", "ties", "breadcrumbs_ties"):
        return {name: elect(list(stack), list(w), "weighted", "wmean", 0.0) for name, stack in stacks.items()}, 1e-6
    shares = w
    if method in ("lines", "expo", "clip", "nearswap"):
        shares = w / w.sum()
    elif method == "soup":
        shares = w / (w.sum() + p.get("base_weight", 0.0))
    elif method == "ema":
        shares = w * p.get("beta", 0.9) ** np.arange(len(w) - 1, -1, -1)
        shares = shares / shares.sum()
    merged = {name: np.tensordot(shares, stack, 1) for name, stack in stacks.items()}
    if method == "lines":
        alpha = p.get("alpha", 0.5)
        if alpha == "auto":
            plain = sum(abs(stack.sum(0)).sum() for stack in stacks.values())
            alpha = plain / sum(abs(one).sum() for one in merged.values()) / len(experts)
        beta = p.get("beta", 1 - alpha)
        outside = alpha + beta if p.get("outside") == "alpha+beta" else alpha
        merged = {name: ramp(list(base), alpha, beta, outside)[name] * one for name, one in merged.items()}
    elif method == "clip":
        merged = {name: clip(one, base[name], classes[name], **p) for name, one in merged.items()}
    elif method == "nearswap":
        merged = {name: np.clip(one, -p.get("t", 1e-3), p.get("t", 1e-3)) for name, one in merged.items()}
    return merged, 1e-5 if p.get("cap") == "spectral" else 1e-6
