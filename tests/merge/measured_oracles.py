"""Methods that rest on measurements, in float64 numpy, from their formulas, one linear map at a time.

Nothing here imports ktmerge.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
from merge_oracles import dare_one, elect, splitmix, stream_key
from oracles_regression import common_then_specific

Array = np.ndarray


@dataclass(frozen=True)
class Map:
    """One linear map in every model.

    Attributes:
        base: theta_0 ``[o, i]``.
        deltas: of each expert.
        weights: of each.
        up: inputs of the base ``[R, i]``.
        down: inputs of each expert.
        keys: seed, experts' names, and what the map is called in keys of random choices.
        kind: ``qkv`` and ``o`` are attention's.
    """

    base: Array
    deltas: list[Array]
    weights: list[float]
    up: Array
    down: list[Array]
    keys: tuple[int, list[str], str]
    kind: str

    @property
    def shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def mean(self) -> Array:
        return sum(share * delta for share, delta in zip(self.shares, self.deltas, strict=True))


def moment(x: Array, eta: float = 1.0) -> Array:
    c = x.T @ x / len(x)
    return eta * c + (1 - eta) * np.diag(np.diag(c))


def regmean(
    m: Map, eta: float = 0.9, ridge: float = 1e-3, base_weight: float = 0.0, normalise: str = "none", **_: Any
) -> Array:
    def gram(x: Array) -> Array:
        c = moment(x, eta)
        return c / np.trace(c) if normalise == "trace" else c

    weights = [weight * len(m.weights) / sum(m.weights) for weight in m.weights]
    grams = [gram(x) for x in m.down]
    total = sum(weight * one for weight, one in zip(weights, grams, strict=True)) + base_weight * gram(m.up)
    rho = ridge * np.trace(total) / len(total)
    target = sum(w * delta @ one for w, delta, one in zip(weights, m.deltas, grams, strict=True)) + rho * m.mean
    return np.linalg.solve(total + rho * np.eye(len(total)), target.T).T


def regmean_back(
    m: Map, a: float = 0.5, eta: float = 0.9, ridge: float = 1e-3, prior_u: float = 0.0, prior_d: float = 0.0
) -> Array:
    up, down = moment(m.up, eta), [moment(x, eta) for x in m.down]
    unit = (np.mean([np.trace(one) for one in down]) + np.trace(up)) / 2 / len(up) * np.eye(len(up))
    up, down = up + (ridge + prior_u) * unit, [one + (ridge + prior_d) * unit for one in down]
    both = (1 - a) * up + a * sum(share * one for share, one in zip(m.shares, down, strict=True))
    target = sum(share * delta @ one for share, delta, one in zip(m.shares, m.deltas, down, strict=True))
    return a * target @ np.linalg.inv(both)


def nullspace(
    merged: Array, up: Array, mode: str = "soft", kappa: float = 1.0, energy: float = 0.95, **_: Any
) -> Array:
    values, vectors = np.linalg.eigh(moment(up))
    if mode == "soft":
        return merged @ (vectors / (1 + kappa * values / values.mean())) @ vectors.T
    values, vectors = values[::-1], vectors[:, ::-1]
    cut = vectors[:, : int(np.argmax(np.cumsum(values) >= energy * values.sum())) + 1]
    return merged - merged @ cut @ cut.T


def cstar(
    m: Map, merged: Array, a: float = 0.5, granularity: str = "tensor", head_size: int = 1, covariance: str = "inputs",
    **_: Any,
) -> Array:  # fmt: skip
    """The least squares over one factor of each group of rows, or, of the output projection, of columns."""

    def told(rows: Array) -> Array:
        return rows.T @ rows / ((rows**2).sum() or 1.0)

    measured = covariance == "inputs"
    up = moment(m.up) if measured else told(m.base)
    down = [moment(x) if measured else told(delta) for x, delta in zip(m.down, m.deltas, strict=True)]
    outputs, inputs = merged.shape
    groups = [(slice(None), slice(None))]
    if granularity == "row":
        groups = [(slice(row, row + 1), slice(None)) for row in range(outputs)]
    elif granularity == "head" and m.kind == "qkv":
        groups = [(slice(row, row + head_size), slice(None)) for row in range(0, outputs, head_size)]
    elif granularity == "head" and m.kind == "o":
        groups = [(slice(None), slice(column, column + head_size)) for column in range(0, inputs, head_size)]
    scaled = np.zeros_like(merged)
    for rows, columns in groups:
        own = merged[rows, columns]

        def product(first: Array, c: Array, own: Array = own, columns: slice = columns) -> float:
            return float((first @ c[columns, columns] * own).sum())

        wanted = sum(s * product(d[rows, columns], c) for s, d, c in zip(m.shares, m.deltas, down, strict=True))
        felt = sum(s * product(own, c) for s, c in zip(m.shares, down, strict=True))
        whole = a * felt + (1 - a) * product(own, up)
        scaled[rows, columns] = own * (a * wanted / whole if whole > 0 else a)
    return scaled


def cts_guard(m: Map, **p: Any) -> Array:
    return cstar(m, nullspace(common_then_specific(m.deltas, m.base, m.weights, **p), m.up, **p), **p)


# --- sparse patches -------------------------------------------------------------------------------------------------


def top(scores: Array, count: int, key: int) -> Array:
    """Mask of the largest, ties to the larger hash of the index."""
    order = np.lexsort((splitmix(key, scores.size), scores.reshape(-1)))
    mask = np.zeros(scores.size, bool)
    mask[order[scores.size - count :]] = True
    return mask.reshape(scores.shape)


def standard(values: Array) -> Array:
    spread = values.std(1, keepdims=True)
    return np.where(spread > 0, (values - values.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1), 0.0)


def least_squares(target: Array, h: Array, mask: Array) -> Array:
    patch = np.zeros_like(target)
    for row, support in enumerate(mask):
        if support.any():
            patch[row, support] = np.linalg.solve(h[np.ix_(support, support)], target[row, support])
    return patch


def tailored(
    m: Map, t: int, density: float = 0.1, score: str = "wanda", decoration: str = "obs", kappa: float = 0.1,
    block: int = 128, damp: float = 0.01,
) -> Array:  # fmt: skip
    """SparseGPT's sweep over what goes back to the base, with R from the inverse itself."""
    tau, c = m.deltas[t], moment(m.down[t])
    h = c + damp * np.trace(c) / len(c) * np.eye(len(c))
    r = np.linalg.cholesky(np.linalg.inv(h)).T
    felt, up = np.sqrt(np.diag(c)), np.sqrt(np.diag(moment(m.up)))
    key = stream_key(m.keys[0], "model_tailor", m.keys[1][t], m.keys[2])
    left, mask = tau.copy(), np.zeros(tau.shape, bool)
    for start in range(0, tau.shape[1], block):
        part = slice(start, min(start + block, tau.shape[1]))
        own, pivots = left[:, part], np.diag(r)[part]
        scores = {
            "mag": abs(own),
            "wanda": abs(own) * felt[part],
            "delta_obs": own**2 / pivots**2,
            "up_aware": abs(own) * felt[part] / (kappa * up.mean() + up[part]),
            "paper": standard(abs(own)) / 2 + standard((m.base[:, part] + own) ** 2 / pivots**2) / 2,
        }[score]
        mask[:, part] = top(scores, floor(density * scores.size), key + start)
        for j in range(part.start, part.stop) if decoration in ("obs", "paper") else ():
            error = np.where(mask[:, j], 0, left[:, j]) / r[j, j]
            left[mask[:, j] == 0, j] = 0
            left[:, j + 1 :] += (-1 if decoration == "obs" else 1) * np.outer(error, r[j, j + 1 :])
    if decoration in ("obs", "paper"):
        return left
    if decoration == "exact":
        return least_squares(tau @ h, h, mask)
    kept = np.where(mask, tau, 0.0)
    size = (kept @ h * kept).sum()
    return kept * ((kept @ h * tau).sum() / size) if decoration == "scalar" and size else kept


def exact_patch(
    m: Map, t: int, density: float = 0.1, kappa: float = 0.0, support: str = "row", ridge: float = 1e-3
) -> Array:
    tau, c = m.deltas[t], moment(m.down[t])
    h = c + ridge * np.trace(c) / len(c) * np.eye(len(c))
    felt, count = np.sqrt(np.diag(c)), floor(density * len(c))
    key = stream_key(m.keys[0], "exact_patch", m.keys[1][t], m.keys[2])
    if support == "shared":
        mask = np.tile(top(np.linalg.norm(tau, axis=0) * felt, count, key), (len(tau), 1))
    else:
        mask = np.stack([top(abs(row) * felt, count, key + number) for number, row in enumerate(tau)])
    return least_squares(tau @ h, h + kappa * moment(m.up), mask)


def union(patches: list[Array], weights: list[float]) -> Array:
    share = sum(weight * (patch != 0) for weight, patch in zip(weights, patches, strict=True))
    total = sum(weight * patch for weight, patch in zip(weights, patches, strict=True))
    return np.where(share > 0, total / np.where(share > 0, share, 1), 0.0)


# --- elections and chances ------------------------------------------------------------------------------------------


def elect_base(trimmed: list[Array], up: Array, weights: list[float], kappa: float = 0.5, **_: Any) -> Array:
    squares = (up**2).mean(0)
    sum_, mass = (sum(w * f(d) for w, d in zip(weights, trimmed, strict=True)) for f in (np.array, np.abs))
    elected = elect(trimmed, weights, "weighted", "wmean", 0.0)
    return np.where(abs(sum_) > kappa * np.sqrt(squares / squares.mean()) * mass, elected, 0.0)


def analytic_q(maps: list[Map], t: int, density: float) -> float:
    """The mean over all outputs of a tensor: q = d or 1, whichever bounds the error of the output tighter."""
    p, found = 1 - density, []
    phi = 0.5 if p == 0.5 else (1 - 2 * p) / np.log((1 - p) / p)
    for m in maps:
        c = m.deltas[t] * abs(m.down[t]).mean(0)
        for row in c:
            noise = np.sqrt(phi * (row**2).sum() * np.log(2 / 0.05))
            found.append(1.0 if noise > density * abs(row.sum()) else density)
    return float(np.mean(found))


def dropped(delta: Array, density: float, q: float, expert: str, name: str, seed: int) -> Array:
    return dare_one(delta, density, "none", expert, name, seed) / q


# --- by Fisher information, element by element ------------------------------------------------------------------------


def informed(
    method: str, deltas: list[Array], weights: list[float], up: Array, down: list[Array], size: float, **p: Any
) -> Array:
    """``up`` and ``down`` as measured, each model's norm being ``size``."""
    norm = p.get("norm", "none" if method.startswith("cgm") else "global")
    floor_ = p.get("floor", 1e-6) if method.startswith("fisher") else 0.0
    known = [(one / size if norm == "global" else one) + floor_ * (1 if norm == "global" else size) for one in down]
    base = (up / size if norm == "global" else up) + floor_ * (1 if norm == "global" else size)
    shares = [weight / sum(weights) for weight in weights]
    if method.startswith("fisher"):
        a = p.get("a", 0.5) if method == "fisher_back" else 1.0
        own, anchor = (shares, 1 - a) if method == "fisher_back" else (weights, p.get("base_weight", 0.0))
        total = a * sum(w * f for w, f in zip(own, known, strict=True)) + anchor * base
        return a * sum(w * f * delta for w, f, delta in zip(own, known, deltas, strict=True)) / total
    alpha, made = p.get("alpha", 0.1), []
    for delta, f in zip(deltas, known, strict=True):
        if method == "cgm":
            made.append(delta * f / (f + alpha * base))
        elif method == "guarded":
            made.append(delta * (f / (f + base) >= 0.5 + p.get("kappa", 0.0)))
        else:
            gain = (f - alpha * base) * delta**2
            order = np.argsort(-gain, axis=None, kind="stable")
            kept = np.zeros(delta.size, bool)
            kept[order[: floor(p.get("density", 0.9) * delta.size)]] = True
            made.append(delta * kept.reshape(delta.shape))
    return sum(share * one for share, one in zip(shares, made, strict=True))
