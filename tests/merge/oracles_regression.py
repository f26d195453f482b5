"""Regression methods without data, in float64 numpy, from the papers' formulas. Nothing here imports ktmerge."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
EVEN = {"a": 1.0, "b": 1.0, "c": 1.0}
UNEVEN = {"a": 0.5, "b": 2.0, "c": 1.0}

CASES: list[tuple[str, dict[str, Any], dict[str, float], float]] = [
    ("wudi_cf", {}, {"a": 1.0, "b": 1.0}, 1.0),
    ("wudi_cf", {"init": "zero", "filter": "tikhonov", "ridge": 0.3}, EVEN, 0.9),
    ("wudi_cf", {"filter": "tikhonov", "ridge": 0.2, "base_weight": 0.5, "base_cov": "identity"}, UNEVEN, 1.2),
    ("actmat", {}, EVEN, 0.8),
    ("actmat", {"filter": "exp", "time": 40.0, "cov_power": 0.5}, UNEVEN, 1.0),
    ("swudi", {}, EVEN, 1.0),
    ("swudi", {"time": 25.0, "keep": 0.3, "init": "sum"}, UNEVEN, 0.4),
    ("swudi_a", {}, {"b": 1.0}, 1.0),
    ("swudi_a", {}, UNEVEN, 1.3),
    ("swudi_a", {"base_weight": 0.3}, EVEN, 1.0),
    ("swudi_a", {"cov_norm": "trace1", "cov_power": 0.5, "rank": "energy", "keep": 0.7}, EVEN, 1.0),
    ("swudi_a", {"cov_norm": "spectral", "rank": "stable"}, EVEN, 1.0),
    ("swudi_a", {"rank": "nuclear", "keep": 0.6}, EVEN, 1.0),
    ("cts", {}, EVEN, 1.0),
    ("cts", {"residual": "sum", "mu": 0.5}, {"a": 1.0, "b": 1.0}, 1.1),
    ("cts", {"residual": "wudi_cf"}, UNEVEN, 0.6),
    ("cts", {"power": 0.5, "residual": "mean"}, EVEN, 1.0),
    ("cts", {"residual": "root"}, {"a": 1.0, "c": -0.5}, 1.0),
]
DEFAULTS: dict[str, dict[str, Any]] = {
    "wudi_cf": {"filter": "none", "rank": "all"},
    "actmat": {"filter": "none", "rank": "all", "cov_norm": "none"},
    "swudi": {"filter": "exp", "rank": "fraction"},
    "swudi_a": {"filter": "none", "rank": "participation"},
}


def covariance(matrix: np.ndarray, norm: str, power: float) -> np.ndarray:
    """(X^T X / s)^q by the eigenvectors of X^T X."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    values = np.where(values > 1e-12 * values.max(), values, 0.0)
    if norm == "fro2":
        values = values / values.sum()
    if norm == "spectral":
        values = values / values.max()
    values = values**power
    if norm == "trace1":
        values = values / values.sum()
    return (vectors * values) @ vectors.T


def count(values: np.ndarray, rank: str, keep: float) -> int:
    """How many of the eigenvalues, in descending order, take part."""
    positive = values[values > 1e-12 * values.max()]
    roots = np.sqrt(positive)
    if rank == "all":
        return values.size
    if rank == "fraction":
        return ceil(round(keep * values.size, 6))
    if rank in ("energy", "nuclear"):
        shares = np.cumsum(positive if rank == "energy" else roots)
        return int(np.argmax(shares >= keep * shares[-1])) + 1
    number = positive.sum() / positive.max() if rank == "stable" else roots.sum() ** 2 / positive.sum()
    return ceil(round(float(number), 6))


def regress(
    deltas: list[np.ndarray], covariances: list[np.ndarray], alphas: list[float], anchor: np.ndarray, **p: Any
) -> np.ndarray:
    """M_0 (I - V f V^T) + D V diag(f / lambda) V^T."""
    weighted = [alpha * delta for alpha, delta in zip(alphas, deltas, strict=True)]
    start = {"mean": sum(weighted) / sum(alphas), "sum": sum(weighted), "zero": 0 * weighted[0]}[p.get("init", "mean")]
    common = sum(alpha * one for alpha, one in zip(alphas, covariances, strict=True)) + anchor
    target = sum(delta @ one for delta, one in zip(weighted, covariances, strict=True))
    values, vectors = np.linalg.eigh(common)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    unit = np.trace(common - anchor) / sum(alphas)
    with np.errstate(divide="ignore", invalid="ignore"):
        f = {
            "none": np.ones_like(values),
            "exp": 1 - np.exp(-values / unit * p.get("time", 300.0)),
            "tikhonov": values / (values + p.get("ridge", 1e-3) * values.mean()),
        }[p["filter"]]
        f = np.where(
            (np.arange(values.size) < count(values, p["rank"], p.get("keep", 0.85))) & (values > 1e-8 * unit), f, 0
        )
        inverse = np.where(f > 0, f / values, 0)
    return start - (start @ vectors * f) @ vectors.T + (target @ vectors * inverse) @ vectors.T


def merge_map(deltas: list[np.ndarray], base: np.ndarray, weights: list[float], **p: Any) -> np.ndarray:
    members = [t for t, delta in enumerate(deltas) if np.linalg.norm(delta) > 1e-12 * np.linalg.norm(base)]
    if not members:
        return np.zeros_like(base)
    norm, power = p.get("cov_norm", "fro2"), p.get("cov_power", 1.0)
    mean = sum(weights[t] for t in members) / len(members)
    anchor = np.zeros((base.shape[1], base.shape[1]))
    if p.get("base_weight"):
        identity = np.eye(base.shape[1]) / base.shape[1]
        own = identity if p.get("base_cov") == "identity" else covariance(base, norm, power)
        anchor = p["base_weight"] * own
    return regress(
        [deltas[t] for t in members], [covariance(deltas[t], norm, power) for t in members],
        [weights[t] / mean for t in members], anchor, **p,
    )  # fmt: skip


def common_then_specific(deltas: list[np.ndarray], base: np.ndarray, weights: list[float], **p: Any) -> np.ndarray:
    """Mean of the coherent responses, plus the rest merged."""
    members = [t for t, delta in enumerate(deltas) if np.linalg.norm(delta) > 1e-12 * np.linalg.norm(base)]
    if not members:
        return np.zeros_like(base)
    mean = sum(abs(weights[t]) for t in members) / len(members)
    own = [weights[t] / mean * deltas[t] for t in members]
    n = len(own)
    if n == 1:
        return deltas[members[0]]
    covariances = [covariance(delta, "fro2", 1.0) for delta in own]
    values, vectors = np.linalg.eigh(sum(covariances))
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors[:, values > 1e-12 * values[0]]
    responses = np.stack([delta @ vectors for delta in own])
    kappa = (responses.sum(0) ** 2).sum(0) / (n * (responses**2).sum((0, 1)))
    gate = np.clip((kappa - 1 / n) / (1 - 1 / n), 0, 1)
    common = (responses.mean(0) * gate) @ vectors.T
    if "power" in p:
        u, s, vt = np.linalg.svd(common, full_matrices=False)
        kept = s > 1e-5 * s[0]
        raised = s[kept] ** p["power"]
        common = (u[:, kept] * raised) @ vt[kept] * np.linalg.norm(s[kept]) / (np.linalg.norm(raised) or 1.0)
    specific = [delta - (delta @ vectors * gate) @ vectors.T for delta in own]
    rule = p.get("residual", "swudi_a")
    if rule in ("sum", "root", "mean"):
        rest = sum(specific) / {"sum": 1, "root": n**0.5, "mean": n}[rule]
    else:
        rank = "all" if rule == "wudi_cf" else "participation"
        rest = regress(specific, covariances, [1.0] * n, np.zeros_like(covariances[0]), filter="none", rank=rank)
    return common + p.get("mu", 1.0) * rest


def merged_deltas(
    method: str, base: Arrays, deltas: Mapping[str, Arrays], weights: Mapping[str, float], seed: int,
    classes: Mapping[str, str], **p: Any,
) -> tuple[Arrays, float]:  # fmt: skip
    experts = sorted(deltas)
    w = [weights[expert] for expert in experts]
    merged = {}
    for name in base:
        own = [deltas[expert][name] for expert in experts]
        if classes[name] == "matrix" and method == "cts":
            merged[name] = common_then_specific(own, base[name], w, **p)
        elif classes[name] == "matrix":
            merged[name] = merge_map(own, base[name], w, **{**DEFAULTS[method], **p})
        else:
            merged[name] = sum(a * delta for a, delta in zip(w, own, strict=True)) / sum(w)
    return merged, 1e-5
