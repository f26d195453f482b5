"""Scores kept from run to run, by all that could change them: nothing is scored twice, and a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.checkpoints.files import write_whole
from ktmerge.errors import KtmergeError
from ktmerge.eval.overlap import OVERLAP, package
from ktmerge.eval.scores import TaskScore

if TYPE_CHECKING:
    from ktmerge.eval.sets import TaskSet


def score_folder() -> Path:
    """Where scores are kept unless another folder is named."""
    return cache_folder() / "scores"


class ScoreStore:
    """A folder of scores, one small file for a model's score on a set.

    A file is found by the digests of the model's weights and configuration, of the task with its data, and of the
    tokenizer, by the context length, the kind of device, the number format and the versions of the libraries. A file
    that cannot be read counts as none; one that cannot be written costs only the next run's time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def key(self, one: TaskSet, conditions: Mapping[str, str | int | None]) -> str:
        """The name under which a score on ``one`` is kept.

        Args:
            one: the set.
            conditions: all else that decides the score: digests, device, versions.
        """
        marked_by = _version(package(one.task.metric)) if one.task.metric in OVERLAP else None
        text = json.dumps([one.digest, marked_by, sorted(conditions.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> TaskScore | None:
        """The score kept under ``key``, if there is one."""
        try:
            return TaskScore.from_json(json.loads(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str, score: TaskScore) -> str:
        """Keep a score, whole or not at all; returns why it could not be kept, if so."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(score.to_json(), ensure_ascii=False, allow_nan=False))
        except (OSError, KtmergeError) as error:
            return str(error)
        return ""

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
