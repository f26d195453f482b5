"""Where the next candidate lies: Optuna's samplers by name, and one for a single knob."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from ktmerge.sweep.curve import Curve
from ktmerge.sweep.keyed import KeyedSampler, SeparateSampler, SobolSampler
from ktmerge.sweep.ledger import VOID
from ktmerge.sweep.settings import Sampler
from ktmerge.sweep.space import METHOD, Range, Space, Value

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_QUARTERS = (1.0, 0.5, 0.25, 0.75)
_APART = 0.01
"""Share of a range within which two values of a knob count as one."""


def make_sampler(name: Sampler, space: Space, limit: float, seed: int) -> BaseSampler:
    """The sampler called ``name``.

    Args:
        name: nsga2, tpe, gp, qmc, grid, curve or greedy.
        space: what is turned.
        limit: the least upstream retention, in percent.
        seed: of the sweep.
    """
    if name == "qmc":
        return SobolSampler(space, seed)
    if name == "curve" and space.knob is not None:
        return CurveSampler(space.knob, limit)
    return KeyedSampler(_MAKERS.get(name, RandomSampler), distributions(space), space.used, seed)


_MAKERS: dict[str, Callable[[int], BaseSampler]] = {
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=16),
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=10),
    "gp": lambda seed: GPSampler(seed=seed, deterministic_objective=False),
}
"""Those that draw; of the others every point is set beforehand."""


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """What Optuna draws from, by key. Every candidate has a value for every range, whether its method knows it or not:
    models of the scores need that."""
    found: dict[str, BaseDistribution] = {}
    if len(space.methods) > 1:
        found[METHOD] = CategoricalDistribution(list(space.methods))
    for one in space.ranges:
        found[one.key] = _distribution(one)
    return found


def _distribution(one: Range) -> BaseDistribution:
    if one.choices:
        return CategoricalDistribution(list(one.choices))
    if one.integer:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)


class CurveSampler(SeparateSampler):
    """One knob: its upper end and quarters, then in turn where retention crosses the limit and where least is known.

    Retention and gain along the knob are taken to be monotone (`Curve`), so that few points tell the whole way.
    """

    def __init__(self, knob: Range, limit: float) -> None:
        self._knob, self._limit = knob, limit

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        counted = [one for one in study.get_trials(deepcopy=False) if VOID not in one.user_attrs]
        others = [one for one in counted if one.number != trial.number]
        taken = [self._share_of(one.params[param_name]) for one in others if param_name in one.params]
        complete = [one for one in others if one.state == TrialState.COMPLETE and param_name in one.params]
        known = [self._share_of(one.params[param_name]) for one in complete]
        values = [one.values for one in complete]

        def following() -> float:
            return next_share(known, values, taken, self._limit, self._nearest)

        for one in others:
            if one.state == TrialState.RUNNING and param_name not in one.params and one.number < trial.number:
                taken.append(following())  # what another draws at this moment
        return self._knob.at(following())

    def _nearest(self, share: float) -> float:
        return self._share_of(self._knob.at(share)) if self._knob.integer else share

    def _share_of(self, found: Value) -> float:
        value = float(found)
        low, high = self._knob.low, self._knob.high
        return float(np.log(value / low) / np.log(high / low)) if self._knob.log else (value - low) / (high - low)


def next_share(
    known: Sequence[float],
    values: Sequence[Sequence[float]],
    taken: Sequence[float],
    limit: float,
    nearest: Callable[[float], float] = float,
) -> float:
    """Where on the way from low (0) to high (1) the next point goes.

    Args:
        known: of the points that were scored.
        values: their retention and gain.
        taken: of all points, those under way included.
        limit: the least retention.
        nearest: to a share, that of a value the knob can have; of whole numbers these are few.
    """

    def free(shares: Iterable[float]) -> float | None:
        """The first where nothing was tried yet."""
        return next((one for one in map(nearest, shares) if all(abs(one - other) > _APART for other in taken)), None)

    if (share := free(_QUARTERS)) is not None:
        return share
    # None, while the first are still with others, or failed.
    curves = [Curve(known, [pair[i] for pair in values]) for i in range(2)] if known else []
    if curves and len(taken) % 2 == 0 and (share := free(reversed(curves[0].crossings(limit)))) is not None:
        return share

    def unknown(gap: tuple[float, float]) -> float:
        a, b = gap
        return b - a + sum(abs(one.at(a) - one.at(b)) / (abs(one.at(1.0) - one.at(0.0)) or 1.0) for one in curves)

    gaps = sorted(pairwise(sorted({0.0, 1.0, *taken})), key=unknown, reverse=True)
    middles = [(a + b) / 2 for a, b in gaps]
    share = free([*middles, 0.0, 1.0])
    return middles[0] if share is None else share


def quietly() -> None:
    """Optuna says only what went wrong."""
    import warnings

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
