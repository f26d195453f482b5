"""Spectral methods in float64 numpy by full SVDs, from the papers' formulas. Nothing here imports ktmerge."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from merge_oracles import elect, trim_all
from oracles_regression import merge_map as regress

Arrays = dict[str, np.ndarray]
EVEN = {"a": 1.0, "b": 1.0, "c": 1.0}
UNEVEN = {"a": 0.5, "b": 2.0, "c": 1.0}
ZERO = 1e-5

CASES: list[tuple[str, dict[str, Any], dict[str, float], float]] = [
    ("dg_hard", {"min_numel": 16, "scale": 0.5}, {"a": 1.0}, 1.0),
    ("dg_hard", {"min_numel": 100, "scale": 0.7}, UNEVEN, 0.8),
    ("dg_hard", {"min_numel": 16, "scale": 1e4}, {"b": 1.0}, 1.0),
    ("svd_truncate", {}, {"a": 1.0}, 0.9),
    ("svd_truncate", {"rule": "rank", "rank": 3, "keep": "tail"}, {"b": 1.0}, 1.0),
    ("svd_truncate", {"rule": "fraction", "share": 0.3}, UNEVEN, 1.0),
    ("svd_truncate", {"rule": "nuclear", "share": 0.5, "keep": "tail"}, {"a": 1.0}, 1.0),
    ("svd_truncate", {"rule": "stable"}, {"a": 1.0}, 1.0),
    ("svd_truncate", {"rule": "participation"}, {"c": 1.0}, 1.0),
    ("star", {}, EVEN, 1.0),
    ("star", {"eta": 0.75}, {"a": 1.0, "b": 3.0}, 1.2),
    ("wiener", {}, {"a": 1.0}, 1.0),
    ("wiener", {"a": 0.3, "prior": "weights"}, {"b": 1.0}, 1.0),
    ("wiener", {"level": "noise"}, UNEVEN, 1.0),
    ("tsv_m", {}, EVEN, 1.0),
    ("tsv_m", {"fraction": 0.25}, UNEVEN, 1.3),
    ("tsv_m", {}, {"a": 1.0, "b": -0.5}, 1.0),
    ("iso_c", {}, EVEN, 1.3),
    ("iso_c", {"power": 0.3}, UNEVEN, 1.0),
    ("soft_iso", {}, EVEN, 0.7),
    ("iso_cts", {}, EVEN, 1.0),
    ("iso_cts", {"common": 0.5}, UNEVEN, 1.0),
    ("iso_cts", {"common": 0.0}, {"a": 1.0, "b": 1.0}, 1.0),
    ("knots", {}, EVEN, 1.0),
    ("knots", {"density": 0.6}, UNEVEN, 0.9),
    ("knots", {"rule": "sum"}, {"a": 1.0, "b": -0.5, "c": 2.0}, 0.5),
    ("cart", {}, EVEN, 1.0),
    ("cart", {"fraction": 0.3, "mu": 0.5}, UNEVEN, 1.1),
    ("resmerge", {}, EVEN, 1.0),
    ("resmerge", {"rank": 2, "beta_min": 0.2, "head": 0.5}, UNEVEN, 1.0),
    ("task_arithmetic_svc", {}, EVEN, 1.0),
    ("task_arithmetic_svc", {"alpha": 0.3}, UNEVEN, 0.8),
    ("ties_svc", {"density": 0.5}, EVEN, 1.0),
    ("tsv_m_svc", {}, EVEN, 1.0),
    ("swudi_a_svc", {"alpha": 0.1}, UNEVEN, 1.0),
    ("norm_budget", {}, UNEVEN, 1.0),
]


def triplets(matrix: np.ndarray, count: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, s, V of the largest values, those that are rounding left out."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    known = int((s > ZERO * s[0]).sum()) if s.size and s[0] > 0 else 0
    count = known if count is None else min(count, known)
    return u[:, :count], s[:count], vt[:count].T


def polar(matrix: np.ndarray) -> np.ndarray:
    u, _, v = triplets(matrix)
    return u @ v.T


def count_of(s: np.ndarray, rule: str, rank: int, share: float) -> int:
    if rule == "rank":
        return rank
    if rule == "fraction":
        return int(np.ceil(round(share * s.size, 6)))
    if rule in ("energy", "nuclear"):
        parts = np.cumsum(s**2 if rule == "energy" else s)
        return int(np.argmax(parts >= share * parts[-1])) + 1
    number = (s**2).sum() / s[0] ** 2 if rule == "stable" else s.sum() ** 2 / (s**2).sum()
    return int(np.ceil(round(float(number), 6)))


def svd_truncate(delta: np.ndarray, base: np.ndarray, **p: Any) -> np.ndarray:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    r = count_of(s, p.get("rule", "energy"), p.get("rank", 16), p.get("share", 0.9))
    head = (u[:, :r] * s[:r]) @ vt[:r]
    return head if p.get("keep", "head") == "head" else delta - head


def star(delta: np.ndarray, base: np.ndarray, **p: Any) -> np.ndarray:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    r = count_of(s, "nuclear", 0, p.get("eta", 0.4))
    return (u[:, :r] * (s[:r] * s.sum() / s[:r].sum())) @ vt[:r]


@cache
def marchenko_pastur_median(beta: float) -> float:
    """By the trapezoid rule over the density on a fine grid that is dense at both edges."""
    low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
    x = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, 400_001))) / 2
    density = np.sqrt(np.maximum((high - x) * (x - low), 0)) / (2 * np.pi * beta * np.maximum(x, 1e-300))
    density[0] = density[1] if beta == 1 else 0
    parts = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    return float(np.interp(0.5 * parts[-1], parts, x))


def noise_level(s: np.ndarray, shape: tuple[int, ...]) -> float:
    return float(np.median(s)) / np.sqrt(marchenko_pastur_median(min(shape) / max(shape)))


def dg_hard(delta: np.ndarray, base: np.ndarray, **p: Any) -> np.ndarray:
    if delta.size < p.get("min_numel", 1024):
        return delta
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    beta = min(delta.shape) / max(delta.shape)
    omega = np.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + np.sqrt(beta**2 + 14 * beta + 1)))
    keep = s > p.get("scale", 1.0) * omega * noise_level(s, delta.shape)
    return (u * np.where(keep, s, 0)) @ vt if keep.any() else np.zeros_like(delta)


def wiener(delta: np.ndarray, base: np.ndarray, **p: Any) -> np.ndarray:
    a, inputs = p.get("a", 0.8), delta.shape[1]
    own = delta.T @ delta / (delta**2).sum()
    if p.get("level") == "noise":
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        return (u * (s**3 / (s**2 + noise_level(s, delta.shape) ** 2))) @ vt
    upstream = base.T @ base / (base**2).sum() if p.get("prior") == "weights" else np.eye(inputs) / inputs
    return delta @ (a * own) @ np.linalg.pinv((1 - a) * upstream + a * own, rcond=1e-12, hermitian=True)


def tsv_m(own: list[np.ndarray], base: np.ndarray, **p: Any) -> np.ndarray:
    if len(own) == 1:
        return own[0]
    size = min(base.shape)
    count = max(1, int(size * p["fraction"]) if "fraction" in p else size // len(own))
    u, s, v = zip(*(triplets(one, count) for one in own), strict=True)
    return (polar(np.hstack(u)) * np.concatenate(s)) @ polar(np.hstack(v)).T


def isotropy(own: list[np.ndarray], base: np.ndarray, power: float, frobenius: bool) -> np.ndarray:
    added = sum(own)
    whole = np.linalg.svd(added, compute_uv=False)
    u, s, v = triplets(added)
    if frobenius:
        return np.sqrt((s**2).sum() / (s ** (2 * power)).sum()) * (u * s**power) @ v.T
    return s.sum() / (whole.size if power == 0 else (s**power).sum()) * (u * s**power) @ v.T


def iso_cts(own: list[np.ndarray], base: np.ndarray, **p: Any) -> np.ndarray:
    n, size = len(own), min(base.shape)
    each = round((size - int(p.get("common", 0.8) * size)) / n)
    each = min(each, size // n)
    u, s, v = triplets(sum(own), size - each * n)
    lefts, values, rights = [], [], []
    for delta in own:
        rest = delta - u @ (u.T @ delta)
        if each and np.linalg.norm(rest) > 1e-6 * np.linalg.norm(delta):
            left, value, right = triplets(rest, each)
            lefts, values, rights = [*lefts, left], [*values, value], [*rights, right]
    strength = np.concatenate([*values, s]).sum() / size
    return strength * polar(np.hstack([*lefts, u])) @ polar(np.hstack([*rights, v])).T


def cart(own: list[np.ndarray], weights: list[float], **p: Any) -> np.ndarray:
    mean = sum(weights) / len(weights)
    centre = sum(w * one for w, one in zip(weights, own, strict=True)) / sum(weights)
    count = int(np.ceil(round(p.get("fraction", 0.06) * min(centre.shape), 6)))
    if len(own) == 1 or count == min(centre.shape):
        return centre
    merged = centre
    for w, one in zip(weights, own, strict=True):
        u, s, vt = np.linalg.svd(one - centre, full_matrices=False)
        merged = merged + p.get("mu", 1.0) * w / mean * (u[:, :count] * s[:count]) @ vt[:count]
    return merged


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float((first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second)))


def resmerge(own: list[np.ndarray], base: np.ndarray, **p: Any) -> np.ndarray:
    if len(own) == 1:
        return own[0]
    n, rank = len(own), p.get("rank", 1)
    low, high = p.get("beta_min", 0.7), p.get("beta_max", 1.0)
    heads = []
    for one in own:
        u, s, v = triplets(one, rank)
        heads.append((u * s) @ v.T)
    rests = [one - head for one, head in zip(own, heads, strict=True)]
    lengths = [np.linalg.norm(rest) for rest in rests]
    units = [rest / length for rest, length in zip(rests, lengths, strict=True)]
    q = sum(units) / np.linalg.norm(sum(units))
    c = float(np.mean([cosine(unit, q) for unit in units]))
    merged = sum(rests) / n
    if c > 1 / np.sqrt(n):
        pairs = np.mean([cosine(x, y) for x, y in combinations(rests, 2)])
        beta = high - (high - low) * ((pairs + 1) / 2 + (c + 1) / 2) / 2
        merged = c**beta * np.mean(lengths) * q
    agreement = np.mean([max(cosine(x, y), 0) for x, y in combinations(heads, 2)])
    common = sum(heads) / np.linalg.norm(sum(heads))
    return merged + common * p.get("head", 0.2) * agreement * np.linalg.norm(merged)


def svc(merged: np.ndarray, own: list[np.ndarray], alpha: float | None) -> np.ndarray:
    n = len(own)
    if not n or not merged.any():
        return merged
    alpha = 1 / n if alpha is None else alpha
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    out = np.zeros_like(merged)
    for r in range(s.size):
        if s[r] <= 1e-7 * s[0]:
            continue
        a = u[:, r] @ merged
        counted = 0.0
        for delta in own:
            b = u[:, r] @ delta
            counted += max(alpha, a @ b / (b @ b)) if b @ b > 1e-12 * (delta**2).sum() else alpha
        out += n / counted * s[r] * np.outer(u[:, r], vt[r])
    return out


def knots(
    own: list[np.ndarray], weights: list[float], experts: list[str], seed: int, density: float = 0.2
) -> np.ndarray:
    """No two coordinates are equal here, so that the hash of the trim decides nothing."""
    u, s, vt = np.linalg.svd(np.hstack(own), full_matrices=False)
    kept = s > 1e-6 * s[0]
    coordinates = [(s[kept, None] * part) for part in np.split(vt[kept], len(own), axis=1)]
    trimmed = [
        trim_all({"c": c}, density, "tensor", expert, seed)["c"] for c, expert in zip(coordinates, experts, strict=True)
    ]
    return u[:, kept] @ elect(trimmed, weights, "weighted", "wmean", 0.0)


def relative(weights: list[float]) -> list[float]:
    mean = sum(abs(weight) for weight in weights) / len(weights)
    return [weight / mean for weight in weights]


TRANSFORMS = {"dg_hard": dg_hard, "svd_truncate": svd_truncate, "star": star, "wiener": wiener}
SUMS = {"tsv_m": tsv_m, "iso_cts": iso_cts, "resmerge": resmerge}


def merge_matrix(
    method: str, deltas: list[np.ndarray], base: np.ndarray, w: list[float], experts: list[str], seed: int, **p: Any
) -> np.ndarray:
    changed = [t for t, delta in enumerate(deltas) if np.linalg.norm(delta) > 1e-12 * np.linalg.norm(base)]
    if not changed:
        return np.zeros_like(base)
    if method in TRANSFORMS:
        made = [TRANSFORMS[method](d, base, **p) if t in changed else d for t, d in enumerate(deltas)]
        return sum(weight * one for weight, one in zip(w, made, strict=True)) / sum(w)
    weights = [w[t] for t in changed]
    own = [weight * deltas[t] for weight, t in zip(relative(weights), changed, strict=True)]
    if method in SUMS:
        return SUMS[method](own, base, **p)
    if method in ("iso_c", "soft_iso"):
        soft = method == "soft_iso"
        return isotropy(own, base, p.get("power", 0.5 if soft else 0.0), soft)
    if method == "cart":
        return cart([deltas[t] for t in changed], weights, **p)
    if method == "knots":
        plain = [deltas[t] for t in changed]
        if p.get("rule") == "sum":
            return sum(weight * one for weight, one in zip(weights, plain, strict=True))
        return knots(plain, weights, [experts[t] for t in changed], seed, p.get("density", 0.2))
    added = sum(weight * delta for weight, delta in zip(w, deltas, strict=True))
    if method == "norm_budget":
        budget = np.mean([np.linalg.norm(one) for one in own])
        return added * (budget / np.linalg.norm(added))
    merged = {
        "task_arithmetic_svc": lambda: added,
        "tsv_m_svc": lambda: tsv_m(own, base),
        "swudi_a_svc": lambda: regress(deltas, base, w, filter="none", rank="participation"),
    }[method]()
    return svc(merged, own, p.get("alpha", 1.0))


def merged_deltas(
    method: str, base: Arrays, deltas: Mapping[str, Arrays], weights: Mapping[str, float], seed: int,
    classes: Mapping[str, str], **p: Any,
) -> tuple[Arrays, float]:  # fmt: skip
    experts = sorted(deltas)
    w = [weights[expert] for expert in experts]
    merged = {}
    for name in base:
        own = [deltas[expert][name] for expert in experts]
        if classes[name] != "matrix":
            merged[name] = sum(a * delta for a, delta in zip(w, own, strict=True)) / sum(w)
        elif method == "ties_svc":
            trimmed = [
                trim_all({name: d}, p["density"], "tensor", e, seed)[name] for e, d in zip(experts, own, strict=True)
            ]
            elected = elect(trimmed, w, "weighted", "wmean", 0.0)
            members = [d for d in own if np.linalg.norm(d) > 1e-12 * np.linalg.norm(base[name])]
            merged[name] = svc(elected, members, p.get("alpha"))
        else:
            merged[name] = merge_matrix(method, own, base[name], w, experts, seed, **p)
    return merged, 1e-5
