"""The verdict in plain words. Says only what the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktmerge.eval.results import Results
    from ktmerge.eval.summary import Estimate, ModelSummary


NBSP = "\N{NO-BREAK SPACE}"


def verdict(results: Results, tuned: Sequence[str] = ()) -> list[str]:
    """A few sentences: the best model, what each fine-tune gains and forgets, and how the two compare.

    Args:
        results: the scores.
        tuned: names of the fine-tunes, whatever was trained; all others but the base count as blends.
    """
    summaries = results.summary.models
    others = [name for name in results.models if name != results.base]
    full = [name for name in tuned if name in others]
    blends = [name for name in others if name not in full]
    if not others:
        return [f"Only the base, '{results.base}', was scored."]
    sentences = [_tuned_sentence(name, summaries[name]) for name in full]
    ranked = results.summary.ranked(blends or others)
    if blends or not full:
        best = ranked[0]
        kind = "blend" if full else "model"
        lead = f"The best {kind} of {len(ranked)}, '{best}'," if len(ranked) > 1 else f"The {kind} '{best}'"
        sentences.insert(0, f"{lead} {_what_it_does(summaries[best])}")
        if full:
            sentences += _against_tuned(results, best, full)
            sentences += [said for name in full if (said := _better_kept(results, name, blends)) is not None]
    return [sentence.replace(" %", NBSP + "%").replace("O = ", f"O{NBSP}={NBSP}") for sentence in sentences]


def _what_it_does(one: ModelSummary) -> str:
    parts = []
    if one.E is not None:
        parts.append(_gain(one.E))
    if one.F is not None:
        parts.append(_forgetting(one.F))
    kept = f"; it keeps {one.retention.value:.1f} % of the base's upstream score" if one.retention is not None else ""
    total = f" O = {_points(one.O)}." if one.O is not None else ""
    return f"{' and '.join(parts)}{kept}.{total}"


def _tuned_sentence(name: str, one: ModelSummary) -> str:
    worst = ""
    if one.worst is not None and one.worst.difference.high < 0:
        worst = f" It loses most on {one.worst.task}: {_points(one.worst.difference)}."
    return f"The fine-tune '{name}' {_what_it_does(one)}{worst}"


def _against_tuned(results: Results, best: str, full: Sequence[str]) -> list[str]:
    rival = results.summary.ranked(full)[0]
    overall = results.difference(best, rival).numbers.get("O")
    if overall is None:
        return []
    which = f"the best fine-tune, '{rival}'," if len(full) > 1 else f"the fine-tune '{rival}'"
    if overall.excludes_zero:
        side = "ahead of" if overall.value > 0 else "behind"
        said = f"In O, '{best}' is {side} {which} by {_size(overall)}."
    else:
        said = f"In O, '{best}' and {which} cannot be told apart: the difference is {_points(overall)}."
    share = specialist_share(results, best, full)
    if share is None:
        return [said]
    whose = f"of '{rival}'"
    if len(full) > 1:
        whose = "of the fine-tunes, each set taken from the one that is best on it"
    return [f"{said} It has {share:.0f} % of the downstream gain {whose}."]


def _better_kept(results: Results, tuned: str, blends: Sequence[str]) -> str | None:
    """The blend that forgets most less than a fine-tune and is on none of the sets it learned seen to be worse."""
    gains = results.summary.models[tuned].differences
    learned = [task.name for task in results.sides("downstream") if gains[task.name].low > 0]
    found = []
    for name in blends:
        compared = results.difference(name, tuned)
        kept = compared.numbers.get("F")
        if kept is not None and kept.low > 0 and all(compared.tasks[task].high >= 0 for task in learned):
            found.append((kept.value, name, compared))
    if not found or not learned:
        return None
    _, name, compared = max(found, key=lambda one: one[0])
    stands = ", ".join(f"{_points(compared.tasks[task])} on {task}" for task in learned)
    nothing = "" if any(compared.tasks[task].excludes_zero for task in learned) else ", which may be nothing,"
    return (
        f"Against '{tuned}', '{name}' stands at {stands}{nothing} "
        f"and keeps {_size(compared.numbers['F'])} more on upstream sets."
    )


def specialist_share(results: Results, model: str, full: Sequence[str]) -> float | None:
    """A model's downstream gain in percent of what the best fine-tune on each set gains; None without a gain."""
    sets = [task.name for task in results.sides("downstream")]
    gains = {name: results.summary.models[name].differences for name in (model, *full)}
    most = sum(max(gains[name][task].value for name in full) for task in sets)
    if most <= 0:
        return None
    return 100 * sum(gains[model][task].value for task in sets) / most


def _gain(E: Estimate) -> str:
    if not E.excludes_zero:
        return f"changes downstream sets by {_points(E)}, which may be nothing,"
    return f"{'gains' if E.value > 0 else 'loses'} {_size(E)} on downstream sets"


def _forgetting(F: Estimate) -> str:
    if not F.excludes_zero:
        return f"forgets nothing that can be told from chance on upstream sets, {_points(F)}"
    return f"{'forgets' if F.value < 0 else 'gains'} {_size(F)} on upstream sets"


def _points(estimate: Estimate) -> str:
    return f"{estimate.value:+.1f} points {_interval(estimate)}"


def _size(estimate: Estimate) -> str:
    return f"{abs(estimate.value):.1f} points {_interval(estimate, flip=estimate.value < 0)}"


def _interval(estimate: Estimate, flip: bool = False) -> str:
    low, high = (-estimate.high, -estimate.low) if flip else (estimate.low, estimate.high)
    return f"[{low:.1f} to {high:.1f}]"
