"""Several score files as one table, if and only if they measured the same thing."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ktmerge.errors import UsageError
from ktmerge.eval.results import Results


def merge_results(results: Sequence[Results]) -> Results:
    """Join results over the same sets and the same base into one; the first one's settings hold.

    A model that several files have (same weights, same scores) is taken once; different ones of one name are told apart
    by the name of their file.

    Raises:
        UsageError: sets, base or the base's scores differ, so that the models do not compare; the reason is said.
    """
    if not results:
        raise UsageError("nothing to compare: name at least one score file.")
    first = results[0]
    models, scores = dict(first.models), dict(first.scores)
    warnings = list(first.warnings)
    for other in results[1:]:
        _refuse_different(first, other)
        for name in other.models:
            if name == other.base:
                continue
            taken = name
            if name in models:
                its = other.scores[name]
                equal = all(np.array_equal(own.scores, its[task].scores) for task, own in scores[name].items())
                if equal and models[name].digest is not None and models[name].digest == other.models[name].digest:
                    continue
                taken = _free_name(f"{Path(other.source or 'other').stem}:{name}", models)
            models[taken], scores[taken] = other.models[name], other.scores[name]
        warnings += [warning for warning in other.warnings if warning not in warnings]
    return replace(first, models=models, scores=scores, warnings=warnings)


def _refuse_different(first: Results, other: Results) -> None:
    pair = f"{first.source or 'the first results'} and {other.source or 'the others'}"
    tasks = [[(task.name, task.digest) for task in one.tasks] for one in (first, other)]
    if first.suite_digest != other.suite_digest or tasks[0] != tasks[1]:
        raise UsageError(
            f"{pair} were measured on different sets ({_different_task(first, other)}); score them in one run."
        )
    own, its = first.models[first.base], other.models[other.base]
    if None not in (own.digest, its.digest) and own.digest != its.digest:
        raise UsageError(f"{pair} have different base models; score them in one run.")
    for task in first.tasks:
        a, b = first.scores[first.base][task.name], other.scores[other.base][task.name]
        if a.scores.shape != b.scores.shape or not np.array_equal(a.scores, b.scores) or a.total != b.total:
            where = f"{own.device} {own.dtype}, {its.device} {its.dtype}"
            raise UsageError(
                f"{pair}: on '{task.name}' the base scores {a.mean:.2f} in one and {b.mean:.2f} in the other, "
                f"item by item not the same ({where}); score them in one run."
            )


def _different_task(first: Results, other: Results) -> str:
    own, its = ({task.name: task.digest for task in results.tasks} for results in (first, other))
    for name in own:
        if name not in its:
            return f"only one has '{name}'"
        if own[name] != its[name]:
            return f"data or settings of '{name}' differ"
    only = [name for name in its if name not in own]
    return f"only one has '{only[0]}'" if only else "their order differs"


def _free_name(wanted: str, taken: Container[str]) -> str:
    number = 2
    name = wanted
    while name in taken:
        name = f"{wanted}-{number}"
        number += 1
    return name
