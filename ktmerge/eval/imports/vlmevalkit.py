"""Tables of VLMEvalKit: ``<model>_<set>_acc.csv`` and ``_score.csv|json`` with totals, and tables with items' marks.

An item's mark stands in ``hit`` (choices) or ``eval_score``; totals in ``Overall``, OCRBench's in ``Final Score Norm``.
Choices are marked as fractions, questions as percent: totals of at most 1, of all models, count as fractions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError, first_line
from ktmerge.eval.imports.found import FoundSet, Items, Total

TABLES = (".xlsx", ".tsv", ".csv")
HARNESS = "VLMEvalKit"
_TOTALS = re.compile(r"_(?:acc|score)\.(?:csv|json|xlsx)$")
_MARKS = ("hit", "eval_score", "score")
_WHOLE = ("Overall", "overall", "Final Score Norm")
_JUDGED = re.compile(r"_(?:exact_matching|chatgpt[\w.-]*|gpt-?\d[\w.-]*|openai|results?)$")


def is_total(path: Path) -> bool:
    return bool(_TOTALS.search(path.name))


def is_table(path: Path) -> bool:
    return path.suffix in TABLES and not is_total(path)


def model_of(path: Path) -> str:
    """The folder above that the file's name begins with: VLMEvalKit writes ``<model>/[<run>/]<model>_<set>...``."""
    for folder in path.absolute().parents:
        if folder.name and path.name.startswith(f"{folder.name}_"):
            return folder.name
    return ""


def set_of(path: Path) -> str:
    """The set's name: what stands between the model's and what says how it was marked."""
    name = path.name.removeprefix(f"{model_of(path)}_")
    name = _TOTALS.sub("", name) if is_total(path) else Path(name).stem
    while _JUDGED.search(name):
        name = _JUDGED.sub("", name)
    return name


def read_total(path: Path) -> FoundSet:
    """The total of a set.

    Raises:
        UsageError: no total is in it.
    """
    row = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _rows(path)[0]
    for key in _WHOLE:
        try:
            value = float(row[key])
        except (KeyError, TypeError, ValueError):
            continue
        if 0 <= value <= 100:
            return FoundSet(set_of(path), HARNESS, totals={"acc" if "_acc." in path.name else "score": Total(value)})
    raise UsageError(f"{path}: none of {', '.join(_WHOLE)} is a number between 0 and 100 in it.")


def read_table(path: Path) -> FoundSet | None:
    """Every item's mark; None for a table of answers that were not marked.

    Raises:
        UsageError: a mark is no number between 0 and 1; the row is named.
    """
    rows = _rows(path)
    mark = next((key for key in _MARKS if key in rows[0]), None)
    if mark is None or "index" not in rows[0]:
        return None
    scores = []
    for number, row in enumerate(rows, 2):
        try:
            score = float(row[mark])
        except (TypeError, ValueError):
            score = -1.0
        if not 0 <= score <= 1:
            raise UsageError(f"{path}, row {number}: '{mark}' is {row[mark]!r}, not a number from 0 to 1.")
        scores.append(score)
    metric = "acc" if mark == "hit" else "score"
    items = Items(
        keys=[str(row["index"]) for row in rows], scores=scores,
        prompts=[str(row.get("question", "")) for row in rows],
        references=[row.get("answer") for row in rows], outputs=[str(row.get("prediction", "")) for row in rows],
    )  # fmt: skip
    return FoundSet(set_of(path), HARNESS, items={metric: items})


def _rows(path: Path) -> list[dict[str, Any]]:
    import pandas

    try:
        if path.suffix == ".xlsx":
            frame = pandas.read_excel(path, keep_default_na=False)  # an answer may be "None" or "NA"
        else:
            frame = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=False)
    except ImportError:
        raise UsageError(
            f"{path}: reading .xlsx needs openpyxl; install it with: pip install 'ktmerge[vlmevalkit]'."
        ) from None
    except Exception as error:  # pandas raises whatever it likes at broken files
        raise UsageError(f"{path}: not a table: {first_line(error)}") from None
    if frame.empty:
        raise UsageError(f"{path}: there are no rows in it.")
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
