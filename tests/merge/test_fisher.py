"""Methods that weigh elements by Fisher information: against their formulas in float64 numpy, and their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ktmerge.errors import KtmergeError
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.ranking import largest
from ktmerge.merge.registry import stages
from ktmerge.merge.stage import Context

NORMS = {"": 2.0, "a": 3.0, "b": 0.5}
SHAPE = (6, 5)


class Measured:
    def __init__(self, **fisher: Tensor) -> None:
        self._fisher = {name.strip("_"): values for name, values in fisher.items()}

    def inputs(self, expert: str = "") -> Tensor:
        raise AssertionError

    def fisher(self, expert: str = "") -> Tensor:
        return self._fisher[expert]

    def fisher_norm(self, expert: str = "") -> float:
        return NORMS[expert]


def random(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def measured(**other: Tensor) -> Measured:
    return Measured(**{"_": random(7) ** 2, "a": random(8) ** 2, "b": random(9) ** 2, **other})


def run(
    stage: str, deltas: Sequence[Tensor], found: Measured | None, weights: tuple[float, ...] = (), **parameters: Any
) -> Tensor:
    context = Context(
        tensor="model.norm.weight", part="norm", layers={}, tensor_class="vector", shape=SHAPE, start=0, seed=1,
        experts=tuple("ab"[: len(deltas)]), weights=weights or (1.0,) * len(deltas), base=random(1),
        kernels=kernels_for(torch.device("cpu")), expert="a" if stages()[stage].kind == "transform" else "",
        measured=found,
    )  # fmt: skip
    one = stages()[stage]
    chosen = one.parameters(**parameters)
    if one.reach == "element":
        context, deltas = replace(context, base=context.base.view(-1)), [delta.view(-1) for delta in deltas]
    for statistic in one.statistics(chosen):
        observer = statistic.observer(deltas[0].numel())
        while not observer.done:
            observer.observe(deltas[0], context)
            observer.end_pass()
        context = replace(context, statistics={statistic.name: observer.result()})
    result: Tensor = one.apply(deltas[0] if one.kind == "transform" else list(deltas), chosen, context)
    assert result.dtype == torch.float32
    return result.view(SHAPE)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def arrays(found: Measured, norm: bool, floor: float) -> dict[str, np.ndarray]:
    return {
        name: found.fisher(name).double().numpy() / (NORMS[name] if norm else 1) + floor * (1 if norm else NORMS[name])
        for name in NORMS
    }


@pytest.mark.parametrize("norm", ["global", "none"])
@pytest.mark.parametrize("base_weight", [0.0, 0.7])
def test_fisher_is_its_formula(norm: str, base_weight: float) -> None:
    deltas, found = [random(2), random(3)], measured()
    merged = run("fisher", deltas, found, (1.0, 3.0), norm=norm, base_weight=base_weight, floor=0.01)
    f = arrays(found, norm == "global", 0.01)
    own = [delta.double().numpy() for delta in deltas]
    close(merged, (f["a"] * own[0] + 3 * f["b"] * own[1]) / (f["a"] + 3 * f["b"] + base_weight * f[""]))


def test_fisher_back_is_its_formula_and_exact_at_its_ends() -> None:
    deltas, found, a = [random(2), random(3)], measured(), 0.3
    f = arrays(found, True, 1e-6)
    own = [delta.double().numpy() for delta in deltas]
    close(run("fisher_back", deltas[:1], found, a=a), a * f["a"] * own[0] / ((1 - a) * f[""] + a * f["a"]))
    both = (f["a"] + 3 * f["b"]) / 4
    wanted = a * (f["a"] * own[0] + 3 * f["b"] * own[1]) / 4 / ((1 - a) * f[""] + a * both)
    close(run("fisher_back", deltas, found, (1.0, 3.0), a=a), wanted)
    assert run("fisher_back", deltas[:1], found, a=1.0).equal(deltas[0])
    assert not run("fisher_back", deltas[:1], found, a=0.0).any()


def test_equal_information_is_plain_interpolation_and_certainty_pins() -> None:
    delta, same = random(2), random(7) ** 2
    found = Measured(_=same * NORMS[""], a=same * NORMS["a"])
    close(run("fisher_back", [delta], found, a=0.3), 0.3 * delta.double())
    sure = same.clone()
    sure[0, 0] = 1e12
    merged = run("fisher_back", [delta], Measured(_=sure, a=same), a=0.5)
    assert abs(float(merged[0, 0])) < 1e-9
    nothing = torch.zeros(SHAPE)
    close(run("fisher_back", [delta], Measured(_=nothing, a=nothing), a=0.3, floor=0.0), 0.3 * delta.double())
    both = run("fisher", [delta, -delta], Measured(a=nothing, b=nothing), (1.0, 3.0), floor=0.0)
    close(both, -0.5 * delta.double())


def test_cgm_is_its_formula() -> None:
    delta, found = random(2), measured()
    up, down = (found.fisher(name).double().numpy() for name in ("", "a"))
    own = delta.double().numpy()
    pull = 0.15 * up / (down + 0.15 * up)
    close(run("cgm", [delta], found, alpha=0.15), own + pull * (0 - own))
    close(run("cgm", [delta], found, alpha=2.0, norm="global"), own * (down / 3) / (down / 3 + 2.0 * up / 2))
    assert run("cgm", [delta], found, alpha=0.0).equal(delta)
    nothing = torch.zeros(SHAPE)
    assert run("cgm", [delta], Measured(_=nothing, a=nothing)).equal(delta)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_cgm_hard_reverts_what_costs_most(density: float) -> None:
    delta, found = random(2), measured()
    up, down = (found.fisher(name).double().numpy() for name in ("", "a"))
    score = ((down - 3.0 * up) * delta.double().numpy() ** 2).reshape(-1)
    kept = np.zeros(30, bool)
    kept[np.argsort(score)[30 - int(density * 30) :]] = density > 0
    merged = run("cgm_hard", [delta], found, alpha=3.0, density=density)
    assert merged.equal(torch.where(torch.as_tensor(kept.reshape(SHAPE)), delta, 0.0))


def test_cgm_hard_ranks_changes_of_any_size() -> None:
    delta, found = random(2), measured()
    small = Measured(**{name or "_": found.fisher(name) * 2.0**-60 for name in ("", "a")})
    kept = run("cgm_hard", [delta], found, alpha=3.0, density=0.5)
    assert run("cgm_hard", [delta * 2.0**-60], small, alpha=3.0, density=0.5).equal(kept * 2.0**-60)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_cgm_hard_decides_between_equal_scores_by_chance(density: float) -> None:
    delta, same = random(2), random(7) ** 2
    merged = run("cgm_hard", [delta], Measured(_=same, a=same), alpha=1.0, density=density)
    assert int(merged.count_nonzero()) == int(density * 30)
    sure = same.clone()
    sure[0] = 10.0  # these five are worth keeping, the others cost as much as they gain
    kept = run("cgm_hard", [delta], Measured(_=same, a=sure), alpha=1.0, density=density)
    assert int(kept.count_nonzero()) == int(density * 30)
    assert int(kept[0].count_nonzero()) == min(5, int(density * 30))
    costly = same.clone()
    costly[0] = 10.0  # and these are the first to go
    left = run("cgm_hard", [delta], Measured(_=costly, a=same), alpha=1.0, density=density)
    assert int(left.count_nonzero()) == int(density * 30)
    assert not left[0].any()


@pytest.mark.parametrize("kappa", [-0.5, 0.0, 0.2])
def test_guarded_keeps_what_downstream_needs_more(kappa: float) -> None:
    delta, found = random(2), measured()
    up, down = (found.fisher(name).double().numpy() / NORMS[name] for name in ("", "a"))
    kept = torch.as_tensor(down / (down + up) > 0.5 + kappa)
    assert run("guarded", [delta], found, kappa=kappa).equal(torch.where(kept, delta, 0.0))
    assert kappa != -0.5 or bool(kept.all())


@pytest.mark.parametrize("stage", ["fisher", "fisher_back", "cgm", "cgm_hard", "guarded"])
def test_without_measurements_there_is_a_sentence(stage: str) -> None:
    with pytest.raises(KtmergeError, match="ktmerge stats"):
        run(stage, [random(2)] if stages()[stage].kind == "transform" else [random(2), random(3)], None)


def test_exactly_as_many_of_the_largest_whatever_ties() -> None:
    scores = torch.randint(-2, 3, (40, 25), generator=torch.Generator().manual_seed(0)).double()
    for count in (0, 1, 17, 500, 999, 1000):
        kept = largest(scores, count, 5)
        assert int(kept.sum()) == count
        if 0 < count < 1000:
            assert scores[kept].min() >= scores[~kept].max()
    first, second = largest(scores, 300, 5), largest(scores, 300, 6)
    assert not first.equal(second)
    assert first.equal(largest(scores.clone(), 300, 5))
    tied = (scores == scores[first].min()) & first
    rows = tied.nonzero()[:, 0].float().mean()
    assert 12 < float(rows) < 28  # no end of the tensor is preferred
    assert int(largest(scores.to(torch.float32), 1000, 5).sum()) == 1000
