"""From other harnesses' files of several models to one score file: the same sets, the same items, one metric a set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from math import sqrt
from pathlib import Path

import numpy as np

from ktmerge import __version__
from ktmerge.errors import UsageError, did_you_mean, first_line
from ktmerge.eval.imports import harness_files, vlmevalkit
from ktmerge.eval.imports.found import FoundSet, Items, Total
from ktmerge.eval.results import Results
from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore
from ktmerge.recipes.suites import Side

Sets = dict[str, FoundSet]


def import_scores(
    files: Mapping[str, Sequence[Path]],
    *,
    base: str,
    upstream: Sequence[str] = (),
    downstream: Sequence[str] = (),
    metrics: Mapping[str, str] | None = None,
    items: Mapping[str, int] | None = None,
) -> Results:
    """Join what lm_eval, lmms-eval or VLMEvalKit wrote of several models.

    Sets whose items are there for every model are compared item by item. Of others the total counts, with its standard
    error: their intervals are unpaired, and what needs pairs leaves them out.

    Args:
        files: per model its files and folders.
        base: the untuned model among them.
        upstream: sets the model must keep.
        downstream: sets it was tuned for; if neither names any, all sets are upstream.
        metrics: of a set, the metric that counts; by default the first that every model has, items preferred.
        items: of a set, how many items are behind a total that comes without a standard error.

    Raises:
        UsageError: a file is none of theirs, sets or items differ between models, a score is beyond 0 to 100.
    """
    if base not in files:
        raise UsageError(f"the base '{base}' is not among the models.{did_you_mean(base, files)}")
    ordered = [base, *(name for name in files if name != base)]
    found = {name: read_files(files[name]) for name in ordered}
    sides = _sides(found, upstream, downstream)
    for name in (*(metrics or ()), *(items or ())):
        if name not in sides:
            raise UsageError(f"'{name}' is none of the sets that are joined.{did_you_mean(name, sides)}")
    tasks: list[TaskInfo] = []
    scores: dict[str, dict[str, TaskScore]] = {name: {} for name in ordered}
    warnings: list[str] = []
    for name, side in sides.items():
        own = {model: _set(found[model], name, model) for model in ordered}
        metric = _metric(name, own, (metrics or {}).get(name))
        info, joined = _joined(name, side, metric, own, (items or {}).get(name))
        tasks.append(info)
        for model, score in joined.items():
            scores[model][name] = score
        if any(score.total is not None for score in joined.values()):
            warnings.append(
                f"set '{name}': only totals were imported, so its intervals are unpaired and wider than they might be, "
                "and McNemar's test and what became of items leave it out."
            )
    harnesses = sorted({one.harness for sets in found.values() for one in sets.values()})
    return Results(
        suite=f"imported from {', '.join(harnesses)}",
        suite_digest=hashlib.sha256("\n".join(task.digest for task in tasks).encode()).hexdigest(),
        tasks=tasks,
        models={name: ModelInfo(str(files[name][0]), None, "", "", "", 0.0) for name in ordered},
        scores=scores, base=base, bootstrap=2000, seed=0, warnings=warnings,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"ktmerge": __version__},
    )  # fmt: skip


def read_files(paths: Sequence[Path]) -> Sets:
    """All sets in a model's files; folders are searched, and of a set written twice the last by name counts.

    Raises:
        UsageError: a named file is none that can be read, or a folder has none.
    """
    sets: Sets = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder.")
        inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        read = [(one, _read(one)) for one in inside]
        if not any(found for _, found in read):
            what = "no file in it is" if path.is_dir() else "is not"
            raise UsageError(
                f"{path}: {what} a result or sample file of lm_eval or lmms-eval, "
                "or a marked table or total of VLMEvalKit."
            )
        for _, found in read:
            for one in found:
                sets[one.name] = _merged(sets.get(one.name), one)
    for one in list(sets.values()):
        if one.parts:
            sets[one.name] = _with_items_of_parts(one, sets)
    return sets


def model_name(path: Path) -> str:
    """What a model's files call it."""
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    for one in inside:
        if harness_files.is_results(one):
            return harness_files.read_results(one)[0]
    return next(
        (name for one in inside if (name := vlmevalkit.model_of(one))), path.stem if path.is_file() else path.name
    )


def _read(path: Path) -> list[FoundSet]:
    try:
        return _found(path)
    except (OSError, ValueError, RecursionError) as error:  # no text in UTF-8, no JSON
        raise UsageError(f"{path}: cannot be read: {first_line(error)}") from None


def _found(path: Path) -> list[FoundSet]:
    task = harness_files.sampled_task(path)
    if task is not None:
        return [harness_files.read_samples(path, task)]
    if harness_files.is_results(path):
        return harness_files.read_results(path)[1]
    if vlmevalkit.is_total(path):
        return [vlmevalkit.read_total(path)]
    table = vlmevalkit.read_table(path) if vlmevalkit.is_table(path) else None
    return [] if table is None else [table]


def _merged(before: FoundSet | None, one: FoundSet) -> FoundSet:
    if before is None:
        return one
    return FoundSet(
        one.name, before.harness if one.harness == harness_files.SAMPLES else one.harness,
        {**before.items, **one.items}, {**before.totals, **one.totals}, {**before.asked, **one.asked},
        one.parts or before.parts,
    )  # fmt: skip


def _with_items_of_parts(group: FoundSet, sets: Sets) -> FoundSet:
    """A group's items: those of all its tasks, where they are there."""
    parts = [sets.get(name) for name in group.parts]
    items = {}
    for metric in group.totals:
        own = [part.items.get(metric) if part is not None else None for part in parts]
        if own and all(one is not None for one in own):
            items[metric] = _pooled(dict(zip(group.parts, (one for one in own if one is not None), strict=True)))
    return replace(group, items=items)


def _pooled(parts: Mapping[str, Items]) -> Items:
    return Items(
        keys=[f"{name}/{key}" for name, one in parts.items() for key in one.keys],
        scores=[score for one in parts.values() for score in one.scores],
        prompts=[prompt for one in parts.values() for prompt in one.prompts],
        references=[reference for one in parts.values() for reference in one.references],
        outputs=[output for one in parts.values() for output in one.outputs],
    )


def _sides(found: Mapping[str, Sets], upstream: Sequence[str], downstream: Sequence[str]) -> dict[str, Side]:
    twice = set(upstream) & set(downstream)
    if twice:
        raise UsageError(f"the set '{min(twice)}' is named upstream and downstream; choose one.")
    sides: dict[str, Side] = {**dict.fromkeys(upstream, "upstream"), **dict.fromkeys(downstream, "downstream")}
    if sides:
        return sides
    every = next(iter(found.values()))
    grouped = {part for one in every.values() for part in one.parts}
    return {name: "upstream" for name in every if name not in grouped}


def _set(sets: Sets, name: str, model: str) -> FoundSet:
    if name not in sets:
        raise UsageError(f"model '{model}' has no results on the set '{name}'.{did_you_mean(name, sets)}")
    return sets[name]


def _metric(name: str, own: Mapping[str, FoundSet], wanted: str | None) -> str:
    def everywhere(metrics: Iterable[Iterable[str]]) -> list[str]:
        first, *rest = [list(one) for one in metrics]
        return [one for one in first if all(one in other for other in rest)]

    known = everywhere(one.metrics() for one in own.values())
    if wanted is not None:
        if wanted not in known:
            raise UsageError(f"set '{name}' has no metric '{wanted}' of all models.{did_you_mean(wanted, known)}")
        return wanted
    by_items = everywhere(one.items for one in own.values())
    if not known:
        said = "; ".join(f"{model}: {', '.join(one.metrics()) or 'none'}" for model, one in own.items())
        raise UsageError(f"set '{name}': the models have no metric from 0 to 1 (or 100) in common ({said}).")
    return (by_items or known)[0]


def _joined(
    name: str, side: Side, metric: str, own: Mapping[str, FoundSet], count: int | None
) -> tuple[TaskInfo, dict[str, TaskScore]]:
    asked = {model: one.asked for model, one in own.items() if one.asked}
    for model, settings in asked.items():
        first_model, first = next(iter(asked.items()))
        if settings != first:
            raise UsageError(f"set '{name}': '{first_model}' was asked with {first}, '{model}' with {settings}.")
    paired = all(metric in one.items for one in own.values())
    base = next(iter(own.values()))
    items = base.items[metric] if paired else Items([], [])
    written = ["imported", name, side, metric, items.keys, asked.get(next(iter(own)), {})]
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    info = TaskInfo(
        name=name, side=side, kind="imported", metric=metric, digest=digest, data_digest=digest,
        rows=list(range(len(items.keys))), prompts=items.prompts, references=items.references,
    )  # fmt: skip
    if paired:
        return info, {
            model: _by_item(name, model, one.items[metric], items.keys, one.harness) for model, one in own.items()
        }
    totals = {model: _total(one, metric) for model, one in own.items()}
    scale = 100 if all(one.score <= 1 for one in totals.values()) else 1  # the same for all, however bad one is
    return info, {
        model: _by_total(name, model, one, one.scale or scale, count, own[model].harness)
        for model, one in totals.items()
    }


def _by_item(name: str, model: str, items: Items, keys: Sequence[str], harness: str) -> TaskScore:
    place = {key: i for i, key in enumerate(items.keys)}
    if len(place) < len(items.keys):
        raise UsageError(f"set '{name}': '{model}' has two results of one item; import one run at a time.")
    if set(place) != set(keys):
        differing = sorted(set(place) ^ set(keys))
        raise UsageError(
            f"set '{name}': '{model}' was asked other items than the base ({len(place)} and {len(keys)}; "
            f"{len(differing)} differ, such as {differing[0]!r}); run both on the same rows."
        )
    order = [place[key] for key in keys]
    details = {"outputs": [items.outputs[i] for i in order]} if items.outputs else {}
    return TaskScore(np.array([items.scores[i] for i in order]), details, {}, harness)


def _total(one: FoundSet, metric: str) -> Total:
    if metric in one.totals:
        return one.totals[metric]
    scores = np.array(one.items[metric].scores)
    return Total(float(scores.mean()), items=len(scores), scale=100)


def _by_total(name: str, model: str, total: Total, scale: int, count: int | None, harness: str) -> TaskScore:
    """A total without a standard error gets the largest there can be: items from 0 to 1 vary by p (1 - p) at most."""
    items, score = count or total.items, scale * total.score
    if total.stderr is not None:
        stderr = scale * total.stderr
    else:
        if not items:
            raise UsageError(
                f"set '{name}': '{model}' has neither items nor a standard error; import the table of items' marks, "
                f"or say how many items there were: --items {name}=N."
            )
        stderr = sqrt(score * (100 - score) / items)
    return TaskScore(np.array([]), {}, {}, harness, total=(score, stderr))
