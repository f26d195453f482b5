"""Samplers that draw by a trial's place in the sweep, not by the process that asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from ktmerge.sweep.ledger import VOID, place_of
from ktmerge.sweep.liveness import WORKER, mark
from ktmerge.sweep.space import METHOD, Point, Range, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, TrialState


_DRAWS = 20
"""Times that a candidate is drawn before one that is there already is taken: there may be no others."""


class _MarkingSampler(BaseSampler):
    """A sampler that marks a trial before it is drawn: if its worker is killed meanwhile, it is known for lost."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        study._storage.set_trial_user_attr(trial._trial_id, WORKER, mark())


class KeyedSampler(_MarkingSampler):
    """A sampler made anew for every draw, with a seed of the trial's own.

    What is drawn follows from the seed, the trial's place and the trials before it: a sweep that was killed and goes on
    draws what it would have drawn, and workers that start together never draw the same. In place of a candidate that
    is there already another is drawn.

    Args:
        make: the sampler from a seed.
        ranges: what is drawn.
        used: of a point, the values that make it a candidate: those that its method knows.
        seed: of the sweep.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        ranges: Mapping[str, BaseDistribution],
        used: Callable[[Point], Point],
        seed: int,
    ) -> None:
        self._make, self._ranges, self._used, self._seed = make, dict(ranges), used, seed
        self._inner = make(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # Nothing is drawn for a trial that was set beforehand, or is a dead worker's.
        return {} if trial.params else self._ranges

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        found = study.get_trials(deepcopy=False)
        whole = [one for one in found if VOID not in one.user_attrs and one.params.keys() == search_space.keys()]
        taken = [self._used(one.params) for one in whole]
        seeds = np.random.default_rng([self._seed, place_of(trial.number, found)])
        point: Point = {}
        for _ in range(_DRAWS):
            self._inner = self._make(int(seeds.integers(2**31)))
            point = self._drawn(study, trial)
            if self._used(point) not in taken:
                break
        return point

    def _drawn(self, study: Study, trial: FrozenTrial) -> Point:
        inner = self._inner
        inner.before_trial(study, trial)
        related = inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial))
        return {
            name: related[name] if name in related else inner.sample_independent(study, trial, name, one)
            for name, one in self._ranges.items()
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner.after_trial(study, trial, state, values)


class SeparateSampler(_MarkingSampler):
    """A sampler of each value by itself."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}


class SobolSampler(SeparateSampler):
    """Points of a scrambled Sobol sequence, one a place: even over all ranges and methods, whatever they score.

    Args:
        space: what is turned.
        seed: of the sweep.
    """

    def __init__(self, space: Space, seed: int) -> None:
        from scipy.stats import qmc

        methods = [Range(METHOD, choices=space.methods)] if len(space.methods) > 1 else []
        self._axes = {one.key: one for one in (*methods, *space.ranges)}
        self._sequence = qmc.Sobol(len(self._axes), scramble=True, seed=seed)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        self._sequence.reset()
        if place := place_of(trial.number, study.get_trials(deepcopy=False)):
            self._sequence.fast_forward(place)
        share = float(self._sequence.random(1)[0, list(self._axes).index(param_name)])
        return self._axes[param_name].at(share)
