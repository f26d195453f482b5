"""Element-wise and geometric methods for several experts, in float64 numpy, from the papers' formulas.

Nothing here imports ktmerge. Choices between equals follow the documented hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
from merge_oracles import elect, splitmix, stream_key, trim_all

Arrays = dict[str, np.ndarray]
EVEN = {"a": 1.0, "b": 1.0, "c": 1.0}
UNEVEN = {"a": 0.5, "b": 2.0, "c": 1.0}
PAIR = {"a": 1.0, "b": 1.0}

CASES: list[tuple[str, dict[str, Any], dict[str, float], float]] = [
    ("magmax", {}, EVEN, 0.5),
    ("magmax", {}, UNEVEN, 1.0),
    ("ram", {}, EVEN, 1.0),
    ("ram", {"epsilon": 3.0}, UNEVEN, 0.7),
    ("ram_plus", {"epsilon": 4.0}, EVEN, 1.0),
    ("ram_plus", {"epsilon": 2.0, "scope": "tensor", "r": 0.5, "alpha": 0.4}, PAIR, 1.0),
    ("sce", {}, EVEN, 1.0),
    ("sce", {"select_topk": 1.0}, UNEVEN, 0.8),
    ("sce", {"select_topk": 0.5, "tie": "plus"}, PAIR, 1.0),
    ("sce", {"select_topk": 0.3, "mask_deltas": False}, EVEN, 1.0),
    ("sce", {"select_topk": 0.3}, {"a": 1.0}, 1.0),
    ("pcb", {}, EVEN, 1.2),
    ("pcb", {"density": 0.3, "scope": "tensor", "tail": 0.05}, UNEVEN, 1.0),
    ("pcb", {"density": 1.0}, PAIR, 0.9),
    ("pcb", {}, {"b": 1.0}, 1.0),
    ("cabs", {}, EVEN, 1.0),
    ("cabs", {"n": 3, "m": 4}, PAIR, 0.8),
    ("cabs", {"n": 2, "m": 7}, {"a": 1.0, "b": 0.5, "c": -1.0}, 1.0),
    ("consensus", {}, EVEN, 0.4),
    ("consensus", {"selectivity": 0.7, "agree": 1}, UNEVEN, 0.5),
    ("consensus", {"agree": 0}, PAIR, 0.3),
    ("emr_unified", {}, EVEN, 0.4),
    ("emr_unified", {}, PAIR, 1.0),
    ("tatr", {}, EVEN, 0.3),
    ("tatr", {"quantile": 0.8, "scope": "tensor"}, {"a": 1.0, "b": -0.5, "c": 2.0}, 1.0),
    ("metagpt", {}, EVEN, 1.0),
    ("metagpt", {"scope": "tensor"}, UNEVEN, 0.9),
    ("nan", {}, UNEVEN, 1.0),
    ("nan", {"scope": "tensor"}, EVEN, 1.0),
    ("localize_stitch", {}, EVEN, 1.0),
    ("localize_stitch", {"density": 0.4, "scope": "tensor"}, UNEVEN, 0.9),
    ("slerp", {}, PAIR, 1.0),
    ("slerp", {"t": 0.2}, {"b": 1.0, "c": 1.0}, 0.8),
    ("slerp", {}, {"a": 1.0, "c": 3.0}, 1.0),
    ("nuslerp", {}, {"a": 3.0, "b": 1.0}, 1.0),
    ("nuslerp", {"granularity": "column", "t": 0.6}, {"a": 1.0, "c": 1.0}, 1.0),
    ("warp", {}, EVEN, 0.4),
    ("warp", {}, UNEVEN, 1.0),
    ("nmean", {}, UNEVEN, 1.0),
    ("karcher", {}, UNEVEN, 1.0),
    ("karcher", {"iterations": 3}, PAIR, 0.9),
    ("model_stock", {}, EVEN, 1.0),
    ("model_stock", {"granularity": "row"}, UNEVEN, 1.0),
    ("lm_cocktail", {"losses": {"a": 2.0, "b": 0.5, "c": 9.0}}, EVEN, 0.5),
    ("lm_cocktail", {"losses": {"a": 2.0, "b": 3.0}, "temperature": 0.5}, {"a": 1.0, "b": 3.0}, 1.0),
    ("opcm", {}, EVEN, 1.0),
    ("opcm", {"alpha": 0.3, "scope": "tensor"}, PAIR, 0.8),
]


def quantile(values: np.ndarray, share: float) -> float:
    """The ceil(q n)-th smallest, the first at least."""
    ordered = np.sort(values, axis=None)
    return float(ordered[max(0, ceil(round(share * ordered.size, 6)) - 1)])


def over_mean(weights: list[float]) -> list[float]:
    return [weight / (sum(map(abs, weights)) / len(weights)) for weight in weights]


def masked_mean(stack: np.ndarray, mask: np.ndarray, weights: Any) -> np.ndarray:
    """sum_A w tau / sum_A w, 0 where A is empty."""
    w = np.reshape(weights, (-1, *[1] * (stack.ndim - 1))) * mask
    total = w.sum(0)
    return np.where(total > 0, (w * stack).sum(0) / np.where(total > 0, total, 1), 0.0)


# --- element by element ---------------------------------------------------------------------------------------------


def magmax(stack: np.ndarray, w: list[float]) -> np.ndarray:
    stack = stack * np.reshape(over_mean(w), (-1, *[1] * (stack.ndim - 1)))
    size = np.abs(stack).max(0)
    signs = [((stack == sign * size) & (size > 0)).any(0) for sign in (1, -1)]
    both = signs[0] & signs[1]
    return size * np.where(both, np.sign(stack.sum(0)), np.where(signs[0], 1.0, -1.0))


def ram_active(stack: np.ndarray, base: np.ndarray, epsilon: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        step = np.where(base == 0, 0.0, 2.0 ** (np.floor(np.log2(np.abs(base))) - 7))
    return (np.abs(stack) >= epsilon * step) & (stack != 0)


def ram(stack: np.ndarray, active: np.ndarray, factors: np.ndarray, w: list[float]) -> np.ndarray:
    number = active.sum(0)
    shape = (-1, *[1] * (stack.ndim - 1))
    own = np.reshape(over_mean(w), shape) * stack * active
    alone = (own * np.reshape(factors, shape)).sum(0)
    return np.where(number > 1, own.sum(0) / np.maximum(number, 1), alone)


def sce(stack: np.ndarray, w: list[float], lots: np.ndarray, **p: Any) -> np.ndarray:
    share = p.get("select_topk", 0.1)
    mask = np.ones(stack.shape[1:], bool)
    if share < 1:
        spread = np.sqrt(stack.var(0)).astype(np.float32).reshape(-1)
        count = int(share * np.count_nonzero(spread))
        order = np.lexsort((lots, spread))[::-1]
        mask = np.isin(np.arange(spread.size), order[:count]).reshape(mask.shape)
    selected = stack * mask
    energy = (selected**2).reshape(len(w), -1).sum(1)
    weights = np.array(w) * energy if energy.any() else np.array(w)
    merged = selected if p.get("mask_deltas", True) else stack
    sign = np.sign(merged.sum(0))
    if p.get("tie") == "plus":
        sign = np.where(sign == 0, 1.0, sign)
    return masked_mean(merged, (np.sign(merged) == sign) & (merged != 0), weights)


def clipped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if high > low:
        return np.clip((values - low) / (high - low), 0, 1)
    return ((values >= high) & (values > 0)).astype(float)


def pcb(stack: np.ndarray, w: list[float], density: float = 0.1, tail: float = 0.01) -> np.ndarray:
    """Of one group of elements ``[N, n]``."""
    if density == 0:
        return np.zeros(stack.shape[1:])
    levels = [(quantile(np.abs(one), tail), quantile(np.abs(one), 1 - tail)) for one in stack]
    size = np.stack([clipped(np.abs(one), *level) for one, level in zip(stack, levels, strict=True)])
    signed = np.sign(stack) * size
    count = sum(high > 0 for _, high in levels)
    score = np.maximum(np.exp(count * size**2) * np.tanh(signed * signed.sum(0)), 0).astype(np.float32)
    grade = np.stack([clipped(one.astype(float), quantile(one, 1 - density), float(one.max())) for one in score])
    total = grade.sum(0)
    value = (np.reshape(over_mean(w), (-1, 1)) * stack * grade).sum(0)
    return np.where(total > 0, value / np.where(total > 0, total, 1), 0.0)


def cabs(stack: np.ndarray, w: list[float], lots: list[np.ndarray], n: int = 64, m: int = 128) -> np.ndarray:
    taken: set[int] = set()
    total = np.zeros(stack[0].size)
    for one, weight, own in zip(stack.reshape(len(w), -1), w, lots, strict=True):
        for start in range(0, one.size, m):
            block = range(start, min(start + m, one.size))
            # nothing is lost by preferring a change that was kept before to no change at all
            ranked = sorted(block, key=lambda j: (j not in taken and one[j] != 0, abs(one[j]), own[j]), reverse=True)
            total[ranked[:n]] += weight * one[ranked[:n]]
            own_taken = {j for j in ranked[:n] if one[j] != 0}
            taken = taken | own_taken
    return total.reshape(stack[0].shape)


def consensus(stack: np.ndarray, w: list[float], selectivity: float = 0.4, agree: int = 2) -> np.ndarray:
    own = stack * np.reshape(w, (-1, *[1] * (stack.ndim - 1)))
    total = own.sum(0)
    votes = (np.abs(own) > selectivity * np.abs(total - own)).sum(0)
    return total * (votes >= agree)


def sensitivity(stack: np.ndarray, w: list[float]) -> np.ndarray:
    size = np.abs(stack * np.reshape(w, (-1, *[1] * (stack.ndim - 1))))
    pairs = sum(size[a] * size[b] for a in range(len(w)) for b in range(len(w)) if a != b)
    return np.sqrt(pairs + np.zeros_like(size[0])).astype(np.float32)


# --- by angles ------------------------------------------------------------------------------------------------------


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = (a * b).sum() / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def chain(stack: np.ndarray, w: list[float], t: float | None) -> np.ndarray:
    merged = stack[0]
    for number in range(1, len(w)):
        merged = slerp(merged, stack[number], w[number] / sum(w[: number + 1]) if t is None else t)
    return merged


def mean_direction(stack: np.ndarray, w: list[float], iterations: int) -> np.ndarray:
    moved = [(one, weight) for one, weight in zip(stack, w, strict=True) if one.any()]
    if not moved:
        return 0 * stack[0]
    shares = [weight / sum(weight for _, weight in moved) for _, weight in moved]
    lengths = [np.linalg.norm(one) for one, _ in moved]
    units = [one / length for (one, _), length in zip(moved, lengths, strict=True)]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(iterations):
        tangent = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            angle = np.arccos(np.clip((mean * unit).sum(), -1, 1))
            if angle > 1e-9:
                tangent = tangent + share * angle / np.sin(angle) * (unit - np.cos(angle) * mean)
        size = np.linalg.norm(tangent)
        if size > 1e-14:
            mean = np.cos(size) * mean + np.sin(size) * tangent / size
            mean = mean / np.linalg.norm(mean)
    return sum(share * length for share, length in zip(shares, lengths, strict=True)) * mean


def stock(stack: np.ndarray, w: list[float]) -> np.ndarray:
    moved = [number for number in range(len(w)) if stack[number].any()]
    if not moved:
        return 0 * stack[0]
    mean = sum(w[t] * stack[t] for t in moved) / sum(w[t] for t in moved)
    n = len(moved)
    if n == 1:
        return mean
    pairs = [(a, b) for a in moved for b in moved if a < b]
    cosine = np.mean(
        [(stack[a] * stack[b]).sum() / np.linalg.norm(stack[a]) / np.linalg.norm(stack[b]) for a, b in pairs]
    )
    return mean * (n * cosine / (1 + (n - 1) * cosine) if cosine > 0 else 0.0)


def opcm(stack: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Of one matrix, before its norm is set."""
    moved = [one for one in stack if one.any()]
    merged = moved[0] if moved else 0 * stack[0]
    for one in moved[1:]:
        left, values, right = np.linalg.svd(merged)
        held = left.T @ one @ right.T
        np.fill_diagonal(held, 0.0)
        rank = int(np.argmax(np.cumsum(values) >= alpha * values.sum())) + 1
        held[:rank, :rank] = 0.0
        merged = merged + left @ held @ right
    return merged


def opcm_all(stacks: Arrays, w: list[float], classes: Mapping[str, str], scope: str = "global", **p: Any) -> Arrays:
    matrices = {name: stack for name, stack in stacks.items() if classes[name] == "matrix"}
    merged = {name: stack.mean(0) for name, stack in stacks.items() if name not in matrices}
    added = {name: opcm(stack, **p) for name, stack in matrices.items()}
    for group in grouped(matrices, scope):
        lengths = np.linalg.norm(flat(matrices, group), axis=1)
        length = np.sqrt(sum((added[name] ** 2).sum() for name in group))
        moved = lengths[lengths > 0]
        ratio = moved.mean() / length if len(moved) > 1 else 1.0
        merged |= {name: ratio * added[name] for name in group}
    return merged


def by_vectors(stack: np.ndarray, kind: str, granularity: str, merge: Any) -> np.ndarray:
    """Each row (what makes an output) or column by itself."""
    if granularity == "tensor" or stack.ndim < 3:
        return merge(stack)
    shape = stack.shape
    folded = stack.reshape(shape[0], shape[1], -1) if kind == "conv" else stack
    folded = folded.reshape(shape[0], -1, *folded.shape[-2:])
    folded = folded.swapaxes(-1, -2) if granularity == "column" else folded
    found = np.stack([np.stack([merge(block[:, j]) for j in range(block.shape[1])]) for block in folded.swapaxes(0, 1)])
    return (found.swapaxes(-1, -2) if granularity == "column" else found).reshape(shape[1:])


# --- methods --------------------------------------------------------------------------------------------------------


def merged_deltas(
    method: str, base: Arrays, deltas: Mapping[str, Arrays], weights: Mapping[str, float], seed: int,
    classes: Mapping[str, str], **p: Any,
) -> tuple[Arrays, float]:  # fmt: skip
    experts = sorted(deltas)
    w = [weights[expert] for expert in experts]
    if method == "localize_stitch":
        density, scope = p.pop("density", 0.05), p.pop("scope", "global")
        deltas = {expert: trim_all(deltas[expert], density, scope, expert, seed) for expert in experts}
    stacks = {name: np.stack([deltas[expert][name] for expert in experts]) for name in base}
    if method == "opcm":
        return opcm_all(stacks, w, classes, **p), 1e-5
    if method in WHOLE:
        return WHOLE[method](stacks, base, w, **p), 1e-7
    merged = {}
    for name, stack in stacks.items():
        lots = {expert: splitmix(stream_key(seed, method, expert, name), base[name].size) for expert in ("", *experts)}
        kind = classes[name]
        if method == "magmax":
            merged[name] = magmax(stack, w)
        elif method == "lm_cocktail":
            share = np.array(w) * np.exp([-p["losses"][expert] / p.get("temperature", 5.0) for expert in experts])
            merged[name] = np.tensordot(share / share.sum(), stack, 1)
        elif method == "sce":
            merged[name] = sce(stack, w, lots[""], **p)
        elif method == "cabs":
            summed = np.tensordot(w, stack, 1)
            merged[name] = summed if kind == "vector" else cabs(stack, w, [lots[expert] for expert in experts], **p)
        elif method == "consensus":
            merged[name] = consensus(stack, w, **p)
        elif method == "emr_unified":
            merged[name] = elect(list(stack), [1.0] * len(w), "mass", "max", 0.0)
        elif method == "localize_stitch":
            merged[name] = masked_mean(stack, stack != 0, w)
        elif method == "ram":
            active = ram_active(stack, base[name], p.get("epsilon", 0.5))
            merged[name] = ram(stack, active, np.ones(len(w)), w)
        else:
            merged[name] = geometric(method, stack, w, kind, **p)
    return merged, 1e-6 if method in GEOMETRIC else 1e-7


GEOMETRIC = ("slerp", "nuslerp", "warp", "nmean", "karcher", "model_stock")


def geometric(method: str, stack: np.ndarray, w: list[float], kind: str, **p: Any) -> np.ndarray:
    granularity = p.get("granularity", "row" if method == "nuslerp" else "tensor")
    if method in ("nmean", "karcher"):
        return mean_direction(stack, w, 0 if method == "nmean" else p.get("iterations", 10))
    if method == "model_stock":
        return by_vectors(stack, kind, granularity, lambda one: stock(one, w))
    return by_vectors(stack, kind, granularity, lambda one: chain(one, w, p.get("t")))


def grouped(stacks: Arrays, scope: str) -> list[list[str]]:
    return [[name] for name in stacks] if scope == "tensor" else [list(stacks)]


def flat(stacks: Arrays, group: list[str]) -> np.ndarray:
    return np.concatenate([stacks[name].reshape(len(stacks[name]), -1) for name in group], axis=1)


def pcb_all(stacks: Arrays, base: Arrays, w: list[float], scope: str = "global", **p: Any) -> Arrays:
    merged = {}
    for group in grouped(stacks, scope):
        parts = np.split(pcb(flat(stacks, group), w, **p), np.cumsum([base[name].size for name in group])[:-1])
        merged |= {name: part.reshape(base[name].shape) for name, part in zip(group, parts, strict=True)}
    return merged


def tatr_all(stacks: Arrays, base: Arrays, w: list[float], scope: str = "global", **p: Any) -> Arrays:
    share = p.get("quantile", 0.99)
    merged = {}
    for group in grouped(stacks, scope):
        limit = quantile(sensitivity(flat(stacks, group), w), share)
        for name in group:
            merged[name] = np.tensordot(w, stacks[name], 1) * (sensitivity(stacks[name], w) <= limit)
    return merged


def norm_share(stacks: Arrays, base: Arrays, w: list[float], rule: str, scope: str = "global") -> Arrays:
    merged = {}
    for group in grouped(stacks, scope):
        size = (flat(stacks, group) ** 2).sum(1)
        if rule == "nan":
            models = {name: (base[name] + stacks[name]).astype(np.float32).astype(float) for name in group}
            size = np.where(size > 0, 1 / np.linalg.norm(flat(models, group), axis=1), 0.0)
        share = np.array(w) * size
        share = share / share.sum() if share.any() else share
        merged |= {name: np.tensordot(share, stacks[name], 1) for name in group}
    return merged


def ram_plus(
    stacks: Arrays, base: Arrays, w: list[float], scope: str = "global", epsilon: float = 0.5, r: float = 0.1,
    alpha: float = 0.2,
) -> Arrays:  # fmt: skip
    merged = {}
    active = {name: ram_active(stacks[name], base[name], epsilon) for name in stacks}
    for group in grouped(stacks, scope):
        on = flat(active, group)
        unique = (on & (on.sum(0) == 1)).sum(1)
        factors = 1 + r * np.minimum(alpha, (on.sum(1) - unique) / np.maximum(unique, 1))
        merged |= {name: ram(stacks[name], active[name], factors, w) for name in group}
    return merged


WHOLE: dict[str, Any] = {
    "pcb": pcb_all,
    "tatr": tatr_all,
    "metagpt": lambda stacks, base, w, **p: norm_share(stacks, base, w, "metagpt", **p),
    "nan": lambda stacks, base, w, **p: norm_share(stacks, base, w, "nan", **p),
    "ram_plus": ram_plus,
}
