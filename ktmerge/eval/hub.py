"""Rows of Hugging Face datasets: on the hub, in the library's cache, or saved in a folder. Knows no tasks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError, did_you_mean, first_line
from ktmerge.recipes.rows import Row, Rows

HUB = "hf:"
COPIES = "KTMERGE_DATASETS"
"""Environment variable: a folder with copies of datasets' repositories, by owner and name."""


def is_saved(folder: Path) -> bool:
    """Whether the datasets library's ``save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def from_disk(folder: Path, subset: str | None, split: str | None) -> Rows:
    """Rows of a dataset that ``save_to_disk`` wrote: with splits, or one of them alone.

    Raises:
        UsageError: no such split, or it cannot be read.
    """
    from datasets import DatasetDict, load_from_disk

    if subset:
        raise UsageError(f"{folder}: a dataset saved on disk has no subsets; leave 'subset' out.")
    state = folder / "state.json"
    if state.is_file() and '"_data_files": []' in state.read_text(encoding="utf-8"):
        raise UsageError(f"{folder}: there are no rows in it.")
    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # of a broken folder: whatever the library raises says which
        raise UsageError(f"{folder}: the dataset cannot be loaded: {first_line(error)}") from None
    if not isinstance(found, DatasetDict):
        if split and found.split is not None and str(found.split) != split:
            raise UsageError(f"{folder}: holds the split '{found.split}' alone, not '{split}'.")
        return _rows_of(found, str(folder), "")
    if split is None:
        raise UsageError(f"{folder}: say with 'split' which part of the dataset to read.{did_you_mean('', found)}")
    if split not in found:
        raise UsageError(f"{folder}: there is no split '{split}' in it.{did_you_mean(split, found)}")
    return _rows_of(found[split], str(folder), f"[{split}]")


def by_library(name: str, subset: str | None, split: str) -> Rows:
    """Rows of a dataset as the datasets library finds it: on the hub, in its cache, or in a folder.

    Raises:
        UsageError: it does not, or there are no rows.
    """
    from datasets import load_dataset

    try:
        return _rows_of(load_dataset(name, subset, split=split), name, f"[{split}]")
    except UsageError as error:
        raise UsageError(f"{HUB}{error}") from None
    except Exception as error:  # offline, no such dataset, no such split: whatever the library raises says which
        raise UsageError(f"{HUB}{name}: {_why(error)}") from None


def _rows_of(dataset: Any, name: str, part: str) -> Rows:
    """Rows of a loaded dataset, as they are stored: images stay the files they are."""
    values: list[dict[str, Any]] = dataset.with_format("arrow")[:].to_pylist()
    if not values:
        raise UsageError(f"{name}: there are no rows in it.")
    rows = [Row(number, f"{name}{part}, row {number + 1}", one) for number, one in enumerate(values)]
    return Rows(rows, digest=content_digest(values))


def _why(error: Exception) -> str:
    """Why a dataset is not there, and what to do about it."""
    said = first_line(error)
    if isinstance(error, ConnectionError | OSError) and not isinstance(error, FileNotFoundError):
        return (
            f"the dataset is not on this machine and the hub cannot be reached: {said.rstrip('.')}. Download it where "
            f"there is a network, or keep a copy of its repository as owner/name in a folder that ${COPIES} names."
        )
    return f"the dataset cannot be loaded: {said}"


def content_digest(values: Any) -> str:
    """sha256 over plain data; bytes count by their own digest."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
