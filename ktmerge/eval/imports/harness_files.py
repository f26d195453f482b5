"""Result and sample files of lm_eval and lmms-eval.

lm_eval 0.4 writes ``results_<date>.json`` and ``samples_<task>_<date>.jsonl``, lmms-eval 0.7 ``<date>_results.json``
and ``<date>_samples_<task>.jsonl``; both have ``results[task]["metric,filter"]`` and ``metric_stderr,filter``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.eval.imports.found import FoundSet, Items, Total

_DATE = r"\d{4}-?\d{2}-?\d{2}[T_]\d{2}[-:]?\d{2}[-:]?\d{2}(?:\.\d+)?|\d{8}_\d{6}"
_SAMPLES = (re.compile(rf"samples_(.+)_(?:{_DATE})\.jsonl"), re.compile(rf"(?:{_DATE})_samples_(.+)\.jsonl"))
_RESULTS = re.compile(r"(?:^|.*_)results(?:_.*)?\.json")
SAMPLES = "samples"  # of either harness
_NOT_METRICS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash",
                "prompt_hash", "target_hash", "input"}  # fmt: skip

_NO_SHARE = re.compile("perplexity|bits_per_byte|^ter$|brier|cider", re.IGNORECASE)
"""Metrics that go beyond 1, or of which less is better; newer files say the latter themselves."""
_PERCENT = ("bleu", "chrf")


def sampled_task(path: Path) -> str | None:
    """The task whose samples a file holds, by its name."""
    return next((found[1] for pattern in _SAMPLES if (found := pattern.fullmatch(path.name))), None)


def is_results(path: Path) -> bool:
    return bool(_RESULTS.fullmatch(path.name))


def read_results(path: Path) -> tuple[str, list[FoundSet]]:
    """The model's name and the totals of every task, groups included.

    Raises:
        UsageError: not such a file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
        results = document["results"]
        version = document.get("lm_eval_version") or document.get("lmms_eval_version") or ""
        sets = [_totals(name, one, document, str(version)) for name, one in results.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: not a results file of lm_eval or lmms-eval ({type(error).__name__}).") from None
    name = str(document.get("model_name") or path.parent.name)
    return Path(name).name or path.parent.name, [one for one in sets if one.totals]


def _totals(name: str, one: dict[str, Any], document: dict[str, Any], version: str) -> FoundSet:
    better = (document.get("higher_is_better") or {}).get(name) or {}
    counted = (document.get("n-samples") or {}).get(name) or {}
    items = counted.get("effective") or one.get("sample_len")
    totals = {}
    for key, value in one.items():
        metric, comma, by = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = one.get(f"{metric}_stderr,{by}")
        if 0 <= value <= 100 and better.get(metric, True) and not _NO_SHARE.search(metric):
            stderr = float(error) if isinstance(error, int | float) else None
            scale = 1 if metric in _PERCENT else None
            totals[_metric(metric, by)] = Total(float(value), stderr, int(items) if items else None, scale)
    shots = (document.get("n-shot") or {}).get(name)
    return FoundSet(
        name, f"{_harness(document)} {version}".strip(), totals=totals, asked={} if shots is None else {"shots": shots},
        parts=_leaves(name, document.get("group_subtasks") or {}),
    )  # fmt: skip


def _harness(document: dict[str, Any]) -> str:
    return "lm_eval" if "lm_eval_version" in document else "lmms-eval"


def _leaves(name: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, those of the groups in it too; of a task none."""
    return [leaf for part in groups.get(name) or () for leaf in _leaves(part, groups) or [part]]


def read_samples(path: Path, task: str) -> FoundSet:
    """Item scores of every metric that has a number between 0 and 1 for each item.

    Raises:
        UsageError: not such a file; the line is named.
    """
    rows = list(_lines(path))
    filters = dict.fromkeys(str(row.get("filter", "none")) for row in rows)
    found = FoundSet(task, SAMPLES)
    for by in filters:
        own = [row for row in rows if str(row.get("filter", "none")) == by]
        for metric in own[0].get("metrics") or [key for key in own[0] if key not in _NOT_METRICS]:
            scores = [_number(row.get(metric)) for row in own]
            if not _NO_SHARE.search(metric) and all(score is not None and 0 <= score <= 1 for score in scores):
                found.items[_metric(metric, by)] = _items(own, [score for score in scores if score is not None])
    return found


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line separators of Unicode
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f"{path}: there are no samples in it.")
    for number, line in rows:
        try:
            row = json.loads(line, parse_constant=str)  # NaN is no score, and no JSON either
        except (ValueError, RecursionError):
            raise UsageError(f"{path}, line {number}: not JSON.") from None
        if not isinstance(row, dict) or "doc_id" not in row:
            raise UsageError(f"{path}, line {number}: a sample has a 'doc_id'; this line has none.")
        yield row


def _items(rows: list[dict[str, Any]], scores: list[float]) -> Items:
    return Items(
        keys=[f"{row['doc_id']}:{row.get('doc_hash', '')}:{row.get('target', '')}" for row in rows],
        scores=scores,
        prompts=[_asked(row) for row in rows],
        references=[row.get("target") for row in rows],
        outputs=[_first(row.get("filtered_resps", row.get("resps", ""))) for row in rows],
    )


def _asked(row: dict[str, Any]) -> str:
    arguments = row.get("arguments")
    if isinstance(arguments, dict) and isinstance(arguments.get("gen_args_0"), dict):
        return str(arguments["gen_args_0"].get("arg_0", ""))
    return _first(row.get("input", ""))


def _first(value: Any) -> str:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return str(value)


def _number(value: Any) -> float | None:
    """A score as it stands, or in the little record that some of lmms-eval's tasks keep."""
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) else None


def _metric(metric: str, by: str) -> str:
    return metric if by == "none" else f"{metric},{by}"
